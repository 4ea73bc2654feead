package engines

import (
	"io"
	"net"
	"path/filepath"
	"sync/atomic"
)

// Counter is a socket in front of an engine's socket and counts the bytes of requests.
type Counter struct {
	Socket string
	sent   atomic.Int64
}

// Counted returns a counting socket for a daemon (--docker-endpoint).
func (e *Engine) Counted(tb TB) *Counter {
	tb.Helper()
	c := &Counter{Socket: filepath.Join(e.Dir, "counted-"+random()+".sock")}
	l, err := net.Listen("unix", c.Socket)
	if err != nil {
		tb.Fatalf("counter: %v", err)
	}

	tb.Cleanup(func() { l.Close() })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go c.pass(client, e.Socket)
		}
	}()

	return c
}

// Sent returns the number of bytes sent to the engine: requests, without responses.
func (c *Counter) Sent() int64 { return c.sent.Load() }

func (c *Counter) pass(client net.Conn, socket string) {
	defer client.Close()

	server, err := net.Dial("unix", socket)
	if err != nil {
		return // as if the engine were down
	}

	go func() {
		_, _ = io.Copy(client, server)
		client.Close()
	}()

	_, _ = io.Copy(server, io.TeeReader(client, c))
	server.Close()
}

// Write counts the bytes of requests.
func (c *Counter) Write(b []byte) (int, error) {
	c.sent.Add(int64(len(b)))
	return len(b), nil
}
