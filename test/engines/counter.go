package engines

import (
	"io"
	"net"
	"path/filepath"
	"sync/atomic"
)

// Counter is a socket in front of an engine's that counts what is asked of it.
type Counter struct {
	Socket string
	sent   atomic.Int64
}

// Counted is a socket for a daemon that is to be counted (--docker-endpoint).
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

// Sent is how many bytes have been sent to the engine: requests, since answers go the other way.
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

// Write counts; it is what the requests are copied to.
func (c *Counter) Write(b []byte) (int, error) {
	c.sent.Add(int64(len(b)))
	return len(b), nil
}
