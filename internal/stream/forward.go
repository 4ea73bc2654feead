package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// dialTimeout bounds the connection to a port of a pod on this machine, which usually succeeds
	// or fails immediately. If the backlog of the server is full, the kernel retries three times in
	// this time.
	dialTimeout = 10 * time.Second
	// familyDelay is the delay of the dial over IPv6 after the one over IPv4.
	familyDelay = 250 * time.Millisecond
	// halfClosedTimeout bounds the silence of the pod after the client has closed its side.
	halfClosedTimeout = 10 * time.Minute

	// Limits of forwarded connections, and of pending ones among them. A browser opens about 10 to
	// 100 connections.
	maxForwards       = 1024
	maxForwardsPerPod = 256
	maxPending        = 128
	maxPendingPerPod  = 64
)

// forwards counts the forwarded connections. The zero value is ready to use.
type forwards struct {
	mu            sync.Mutex // guards the fields below
	open, pending int        // total
	pods          map[string]*podForwards
}

type podForwards struct{ open, pending int }

// forward is the slot of one connection.
type forward struct {
	owner   *forwards
	podID   string
	pending bool
}

// acquire returns the slot of a new, pending connection.
func (f *forwards) acquire(podID string) (*forward, error) {
	f.mu.Lock()
	defer f.mu.Unlock()

	p := f.pods[podID]
	if p == nil {
		p = &podForwards{}
	}

	for _, c := range []struct {
		n, limit int
		name     string
	}{
		{p.open, maxForwardsPerPod, "forwarded connections to this pod"},
		{f.open, maxForwards, "forwarded connections on this node"},
		{p.pending, maxPendingPerPod, "connections waiting for this pod to accept them"},
		{f.pending, maxPending, "connections waiting for pods on this node to accept them"},
	} {
		if c.n >= c.limit {
			return nil, fmt.Errorf("limit of %d %s reached; close some, or try again later: %w", c.limit, c.name,
				errdefs.ErrResourceExhausted)
		}
	}

	if f.pods == nil {
		f.pods = map[string]*podForwards{}
	}

	f.pods[podID] = p
	f.open, p.open, f.pending, p.pending = f.open+1, p.open+1, f.pending+1, p.pending+1

	return &forward{f, podID, true}, nil
}

// connected ends the pending state, after the pod has accepted or refused the connection.
func (w *forward) connected() {
	w.owner.mu.Lock()
	defer w.owner.mu.Unlock()
	w.connectedLocked()
}

func (w *forward) connectedLocked() {
	if w.pending {
		w.pending = false
		w.owner.pending--
		w.owner.pods[w.podID].pending--
	}
}

// release frees the slot.
func (w *forward) release() {
	w.owner.mu.Lock()
	defer w.owner.mu.Unlock()

	w.connectedLocked()
	p := w.owner.pods[w.podID]
	w.owner.open--
	if p.open--; p.open == 0 {
		delete(w.owner.pods, w.podID)
	}
}

// podError is an error affecting all connections to a pod.
type podError struct{ error }

// Unwrap returns the cause.
func (e *podError) Unwrap() error { return e.error }

// forward connects a client to a port on the loopback interface of a pod. It copies in both
// directions until the pod closes its side or ctx, the context of the client, ends. A goroutine
// discards further data of the client, and closes the channel discarded when the client has closed
// its side.
func (s *Server) forward(
	ctx context.Context, podID string, port int32, from io.Reader, to io.Writer,
) (discarded <-chan struct{}, err error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("port %d is not between 1 and 65535", port)
	}

	slot, err := s.forwards.acquire(podID)
	if err != nil {
		return nil, err
	}
	defer slot.release()

	netns, err := s.runtime.OpenNetNS(podID)
	if err != nil {
		return nil, &podError{err}
	}

	pod, err := s.dialLoopback(ctx, netns, uint16(port))
	netns.Close() // nil for the host's namespace; Close accepts nil
	slot.connected()
	if err != nil {
		return nil, err
	}

	return relay(ctx, from, to, pod)
}

// dialLoopback connects over IPv4 or IPv6. A server may listen on one of them, and packets over the
// other may be dropped.
func (s *Server) dialLoopback(ctx context.Context, netns *os.File, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	type result struct {
		conn net.Conn
		err  error
	}

	results := make(chan result, 2)
	var dials sync.WaitGroup
	dial := func(ip netip.Addr) {
		dials.Go(func() {
			c, err := s.dial(ctx, netns, netip.AddrPortFrom(ip, port))
			results <- result{c, err}
		})
	}

	var pod net.Conn
	defer func() { // cancel the other dial
		cancel()
		dials.Wait()
		close(results)
		for r := range results {
			if r.conn != nil {
				r.conn.Close()
			}
		}
	}()

	var errs []error
	dial(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	next := time.NewTimer(familyDelay)
	defer next.Stop()

	for v6, open := false, 1; open > 0; {
		select {
		case r := <-results:
			if r.err == nil {
				pod = r.conn
				return pod, nil
			}
			errs, open = append(errs, r.err), open-1
		case <-next.C:
		}

		if !v6 {
			v6 = true
			open++
			dial(netip.IPv6Loopback())
		}
	}

	return nil, errors.Join(errs...)
}

// relay copies between a client and a connection to a pod.
func relay(ctx context.Context, from io.Reader, to io.Writer, pod net.Conn) (discarded <-chan struct{}, err error) {
	defer pod.Close()

	stop := context.AfterFunc(ctx, func() { pod.Close() })
	defer stop()

	output := &silenceReader{Conn: pod, timeout: halfClosedTimeout}
	done := make(chan struct{})
	go func() {
		defer close(done)

		_, _ = io.Copy(pod, from) // pass on the end of the input, even after an error
		if half, ok := pod.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}

		output.begin()
		// Unread data would block the other connections of the session.
		_, _ = io.Copy(io.Discard, from)
	}()

	err = copyChunks(to, output)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("pod sent no data for %v after the client closed its side", halfClosedTimeout)
	case errors.Is(err, io.ErrClosedPipe), errors.Is(err, net.ErrClosed), ctx.Err() != nil:
		err = nil // the client has disconnected
	}

	return done, err
}

// copyChunks copies until the end of r.
func copyChunks(w io.Writer, r io.Reader) error {
	c := chunkPool.Get().(*chunk)
	defer chunkPool.Put(c)

	for {
		n, err := r.Read(c.data())
		if c.n = n; n > 0 {
			if err := sendChunk(w, c); err != nil {
				return err
			}
		}

		switch {
		case err == io.EOF: //nolint:errorlint // io.Reader's contract
			return nil
		case err != nil:
			return err
		}
	}
}

// silenceReader reads from a connection. After begin, it fails when no data arrives for the
// timeout.
type silenceReader struct {
	net.Conn
	timeout time.Duration
	active  atomic.Bool
}

func (s *silenceReader) begin() {
	s.active.Store(true)
	_ = s.SetReadDeadline(time.Now().Add(s.timeout))
}

func (s *silenceReader) Read(p []byte) (int, error) {
	if s.active.Load() {
		_ = s.SetReadDeadline(time.Now().Add(s.timeout))
	}
	return s.Conn.Read(p)
}
