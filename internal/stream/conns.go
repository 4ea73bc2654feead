package stream

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
)

// listener knows its open connections, also those that have been hijacked, of which http.Server knows nothing.
type listener struct {
	net.Listener

	mu     sync.Mutex // guards the rest
	open   map[*conn]struct{}
	closed bool
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tracked := &conn{Conn: c, owner: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errors.Join(net.ErrClosed, c.Close())
	}
	l.open[tracked] = struct{}{}
	return tracked, nil
}

// closeAll closes every connection and refuses new ones.
func (l *listener) closeAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for c := range l.open {
		c.Conn.Close() // whoever reads it notices
	}
}

// conn notices when its client is gone.
type conn struct {
	net.Conn
	owner *listener
	end   context.CancelFunc // of its requests; set by contextOf, before anything is read
}

// contextOf gives a connection's requests a context that ends with the connection (http.Server.ConnContext).
func contextOf(ctx context.Context, nc net.Conn) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	nc.(*conn).end = cancel
	return ctx
}

// Read takes a failed read for the client's end, but not a deadline: net/http sets one to interrupt its own reading.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.end()
	}
	return n, err
}

// Close ends the connection's requests, too.
func (c *conn) Close() error {
	c.end()
	c.owner.mu.Lock()
	delete(c.owner.open, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}
