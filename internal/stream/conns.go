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

// listener enables the detection of unreachable clients.
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

// conn is a connection with a context and an optional idle timeout. The context ends when the
// client disconnects.
type conn struct {
	*connlimit.Conn
	ctx context.Context // ctx and end are set by withConn, before the first read
	end context.CancelFunc

	frames *frameConn // writes to the connection after the upgrade

	active atomic.Int64 // time of the last traffic, Unix time in ns
	mu     sync.Mutex   // guards the fields below
	timer  *time.Timer  // closes an idle session
	closed bool
}

type connKey struct{}

// withConn adds a connection to the context of its requests (http.Server.ConnContext). The context
// ends with the connection.
func withConn(ctx context.Context, nc net.Conn) context.Context {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	c := nc.(*conn)
	c.ctx, c.end = context.WithCancel(context.WithValue(ctx, connKey{}, c))
	return c.ctx
}

// Read implements net.Conn. A failed read means that the client has disconnected, except for an
// exceeded deadline: net/http sets one to interrupt its own reads.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.end()
	}
	c.recordTraffic(n)
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.recordTraffic(n)
	return n, err
}

// acked returns the number of bytes acknowledged by the client, or 0 if it is unknown (TCP_INFO,
// tcp(7)). It grows while a slow client reads, even if a write blocks.
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

// recordTraffic records the time of traffic, if n is not 0.
func (c *conn) recordTraffic(n int) {
	if n > 0 {
		c.active.Store(time.Now().UnixNano())
	}
}

// closeWhenIdle closes the connection after the timeout without any traffic.
func (c *conn) closeWhenIdle(timeout time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()

	c.active.Store(time.Now().UnixNano())
	c.timer = time.AfterFunc(timeout, func() {
		idle := time.Since(time.Unix(0, c.active.Load()))
		if idle >= timeout {
			c.Close()
			return
		}

		c.mu.Lock()
		defer c.mu.Unlock()

		if c.ctx.Err() == nil {
			c.timer.Reset(timeout - idle)
		}
	})
}

// Close closes the connection and ends its requests. A second call returns nil, because an SPDY
// session would wait a second to report the error.
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
