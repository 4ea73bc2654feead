// Package connlimit bounds the open connections of a listener. Idle clients can neither exhaust the
// daemon's memory and file descriptors nor lock out other clients.
//
// A connection is pending until the server calls Keep, for example after the client has presented a
// valid token. A new connection beyond the limit of pending ones replaces the oldest. A client with
// an immediate request is therefore always served, however many idle connections others hold. Kept
// connections are never closed in favor of others; beyond their limit Keep returns an error.
package connlimit

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
)

// responseTimeout bounds the write of Limits.Response, which fits into an empty socket buffer.
const responseTimeout = 100 * time.Millisecond

// ErrTooMany is the error of Keep beyond a limit.
var ErrTooMany = errors.New("too many open connections")

// Limits bound one listener. Zero means no limit.
type Limits struct {
	Pending        int // total connections before Keep
	PendingPerPeer int // connections before Keep of one source address
	Kept           int // total connections after Keep
	KeptPerPeer    int // connections after Keep of one source address
	// Response is sent to a pending connection before it is closed for a newer one. It must be
	// short. If it is empty, nothing is sent.
	Response []byte
}

// Listener is a listener with limits. It is safe for concurrent use.
type Listener struct {
	net.Listener
	limits Limits

	mu      sync.Mutex // guards the fields below, and since and kept of each connection
	open    map[*Conn]struct{}
	pending map[netip.Addr]int
	kept    map[netip.Addr]int
	number  struct{ pending, kept int }
	closed  bool
}

// New returns a listener with limits on top of l.
func New(l net.Listener, limits Limits) *Listener {
	return &Listener{
		Listener: l,
		limits:   limits,
		open:     map[*Conn]struct{}{},
		pending:  map[netip.Addr]int{},
		kept:     map[netip.Addr]int{},
	}
}

// Accept returns the next connection, a *Conn. Beyond a limit it closes an older pending
// connection.
func (l *Listener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}

	c := &Conn{
		Conn:  nc,
		owner: l,
		peer:  peerOf(nc.RemoteAddr()),
		since: time.Now(),
	}

	victims, err := l.admit(c)
	for _, v := range victims {
		v.reject(l.limits.Response)
	}

	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}

	return c, nil
}

// admit adds a pending connection. It removes older ones beyond a limit and returns them for the
// caller to close.
func (l *Listener) admit(c *Conn) (victims []*Conn, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()

	if l.closed {
		return nil, net.ErrClosed
	}
	if n := l.limits.PendingPerPeer; n > 0 && l.pending[c.peer] >= n {
		victims = append(victims, l.evictLocked(c.peer))
	}
	if n := l.limits.Pending; n > 0 && l.number.pending >= n {
		victims = append(victims, l.evictLocked(l.busiestLocked()))
	}

	l.open[c] = struct{}{}
	l.countLocked(c, 1)

	return victims, nil
}

// busiestLocked returns the peer with the most pending connections.
func (l *Listener) busiestLocked() (peer netip.Addr) {
	most := 0
	for p, n := range l.pending {
		if n > most {
			peer, most = p, n
		}
	}
	return peer
}

// evictLocked removes the oldest pending connection of a peer. The peer must have one.
func (l *Listener) evictLocked(peer netip.Addr) *Conn {
	var oldest *Conn
	for c := range l.open {
		if !c.kept && c.peer == peer && (oldest == nil || c.since.Before(oldest.since)) {
			oldest = c
		}
	}

	l.removeLocked(oldest)

	return oldest
}

// countLocked adds n to the counters of the connection's state (pending or kept).
func (l *Listener) countLocked(c *Conn, n int) {
	peers, total := l.pending, &l.number.pending
	if c.kept {
		peers, total = l.kept, &l.number.kept
	}

	*total += n
	if peers[c.peer] += n; peers[c.peer] == 0 {
		delete(peers, c.peer)
	}
}

func (l *Listener) removeLocked(c *Conn) {
	if _, ok := l.open[c]; ok {
		delete(l.open, c)
		l.countLocked(c, -1)
	}
}

// CloseAll closes every connection, including hijacked ones, and refuses new ones.
func (l *Listener) CloseAll() {
	l.mu.Lock()
	defer l.mu.Unlock()

	l.closed = true
	for c := range l.open {
		c.Conn.Close() // the next read of its owner fails
	}
}

// Conn is a connection of a Listener.
type Conn struct {
	net.Conn
	owner *Listener
	peer  netip.Addr

	since time.Time // both guarded by owner.mu
	kept  bool
}

// Keep protects the connection from eviction. It returns ErrTooMany beyond the limit, and
// net.ErrClosed if the connection is closed. A second call has no effect.
func (c *Conn) Keep() error {
	l := c.owner
	l.mu.Lock()
	defer l.mu.Unlock()

	switch _, open := l.open[c]; {
	case !open:
		return net.ErrClosed
	case c.kept:
		return nil
	case l.limits.Kept > 0 && l.number.kept >= l.limits.Kept:
		return fmt.Errorf("%w: %d", ErrTooMany, l.number.kept)
	case l.limits.KeptPerPeer > 0 && l.kept[c.peer] >= l.limits.KeptPerPeer:
		return fmt.Errorf("%w from %s: %d", ErrTooMany, c.peer, l.kept[c.peer])
	}

	l.countLocked(c, -1)
	c.kept = true
	l.countLocked(c, 1)

	return nil
}

// Touch makes a pending connection the newest, for example after a complete request.
func (c *Conn) Touch() {
	c.owner.mu.Lock()
	defer c.owner.mu.Unlock()
	c.since = time.Now()
}

// Close closes the connection and frees its slot.
func (c *Conn) Close() error {
	c.owner.mu.Lock()
	c.owner.removeLocked(c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}

// reject sends the response, if any, and closes an evicted connection.
func (c *Conn) reject(response []byte) {
	if len(response) > 0 {
		_ = c.Conn.SetWriteDeadline(time.Now().Add(responseTimeout))
		_, _ = c.Conn.Write(response)
	}
	c.Conn.Close()
}

// peerOf returns the address to count connections by: the host address, or for IPv6 beyond loopback
// the /64 prefix, because one host may own all of it.
func peerOf(a net.Addr) netip.Addr {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Addr{}
	}

	ip := ap.Addr().Unmap().WithZone("")
	if ip.Is6() && !ip.IsLoopback() {
		if p, err := ip.Prefix(64); err == nil {
			return p.Addr()
		}
	}

	return ip
}
