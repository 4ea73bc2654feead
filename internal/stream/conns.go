package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/connlimit"
)

// listener makes its connections find clients that are gone.
type listener struct{ *connlimit.Listener }

func (l *listener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}

	c := &conn{Conn: nc.(*connlimit.Conn)}
	if t, ok := c.Conn.Conn.(*net.TCPConn); ok {
		_ = t.SetKeepAliveConfig(keepAlive)
	}

	return c, nil
}

// conn is a connection whose context ends when its client is gone, and which may end by silence.
type conn struct {
	*connlimit.Conn
	ctx context.Context // both set by withConn, before anything is read
	end context.CancelFunc

	frames *frameConn // writes to it, once it is a session

	active atomic.Int64 // Unix time in ns of the last byte
	mu     sync.Mutex   // guards the rest
	timer  *time.Timer  // closes a silent session
	closed bool
}

type connKey struct{}

// withConn makes a connection known to the handlers of its requests (http.Server.ConnContext).
// Their context ends with the connection.
func withConn(ctx context.Context, nc net.Conn) context.Context {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	c := nc.(*conn)
	c.ctx, c.end = context.WithCancel(context.WithValue(ctx, connKey{}, c))
	return c.ctx
}

// Read takes a failed read for the client's end, but not a deadline: net/http sets one to interrupt
// its own reading.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.end()
	}
	c.note(n)
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.note(n)
	return n, err
}

// acked is how many bytes the client has acknowledged, 0 if that is unknown (TCP_INFO, tcp(7)). It
// grows while a slow client reads, also when a write does not return.
func (c *conn) acked() (n uint64) {
	t, ok := c.Conn.Conn.(*net.TCPConn)
	if !ok {
		return 0
	}

	raw, err := t.SyscallConn()
	if err != nil {
		return 0
	}

	_ = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = info.Bytes_acked
		}
	})

	return n
}

// note remembers that bytes have moved.
func (c *conn) note(n int) {
	if n > 0 {
		c.active.Store(time.Now().UnixNano())
	}
}

// closeWhenSilent closes the connection when no byte has moved for this long.
func (c *conn) closeWhenSilent(timeout time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()

	c.active.Store(time.Now().UnixNano())
	c.timer = time.AfterFunc(timeout, func() {
		silent := time.Since(time.Unix(0, c.active.Load()))
		if silent >= timeout {
			c.Close()
			return
		}

		c.mu.Lock()
		defer c.mu.Unlock()

		if c.ctx.Err() == nil {
			c.timer.Reset(timeout - silent)
		}
	})
}

// Close ends the connection's requests, too. Closing again is no error: a session of SPDY would
// wait a second to report it.
func (c *conn) Close() error {
	c.end()
	c.mu.Lock()
	closed := c.closed
	c.closed = true
	if c.timer != nil {
		c.timer.Stop()
	}

	c.mu.Unlock()
	if closed {
		return nil
	}

	return c.Conn.Close()
}
