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
	// dialTimeout is for a connection to a port in a pod on this machine, which is accepted or
	// refused at once. A server whose queue is full gets three more attempts of the kernel in this
	// time.
	dialTimeout = 10 * time.Second
	// familyDelay is the head start of IPv4.
	familyDelay = 250 * time.Millisecond
	// halfClosed is how long the pod may be silent after the client has ended its side.
	halfClosed = 10 * time.Minute

	// Bounds of connections to ports, and of those that are not accepted yet. A browser opens some
	// 10 to 100.
	maxForwards       = 1024
	maxForwardsPerPod = 256
	maxPending        = 128
	maxPendingPerPod  = 64
)

// forwards counts the connections to ports of pods. The zero value is ready.
type forwards struct {
	mu            sync.Mutex
	open, pending int // in all
	pods          map[string]*podForwards
}

type podForwards struct{ open, pending int }

// forward is one connection's place in the counts.
type forward struct {
	owner   *forwards
	podID   string
	pending bool
}

// acquire takes a place for a connection that is not accepted yet.
func (f *forwards) acquire(podID string) (*forward, error) {
	f.mu.Lock()
	defer f.mu.Unlock()

	p := f.pods[podID]
	if p == nil {
		p = &podForwards{}
	}

	for _, bound := range []struct {
		n, limit int
		what     string
	}{
		{p.open, maxForwardsPerPod, "connections are forwarded to this pod"},
		{f.open, maxForwards, "connections are forwarded to pods of this node"},
		{p.pending, maxPendingPerPod, "connections wait for this pod to accept them"},
		{f.pending, maxPending, "connections wait for pods of this node to accept them"},
	} {
		if bound.n >= bound.limit {
			return nil, fmt.Errorf(
				"%d %s, the limit; close some, or try again: %w",
				bound.n,
				bound.what,
				errdefs.ErrResourceExhausted,
			)
		}
	}

	if f.pods == nil {
		f.pods = map[string]*podForwards{}
	}

	f.pods[podID] = p
	f.open, p.open, f.pending, p.pending = f.open+1, p.open+1, f.pending+1, p.pending+1

	return &forward{f, podID, true}, nil
}

// connected reports that the pod has accepted, or refused.
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

// release gives the place up.
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

// podError is the failure of a pod, not of one connection to it.
type podError struct{ error }

// Unwrap returns the reason.
func (e *podError) Unwrap() error { return e.error }

// forward connects a client to a port on the loopback of a pod, and copies both ways until the pod
// has ended its side or ctx, which stands for the client, ends. It goes on to discard what the
// client sends, and closes discarded when the client has ended its side.
func (s *Server) forward(
	ctx context.Context,
	podID string,
	port int32,
	from io.Reader,
	to io.Writer,
) (discarded <-chan struct{}, err error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("port %d is not between 1 and 65535", port)
	}

	place, err := s.forwards.acquire(podID)
	if err != nil {
		return nil, err
	}
	defer place.release()

	netns, err := s.runtime.OpenNetNS(podID)
	if err != nil {
		return nil, &podError{err}
	}

	pod, err := s.dialLoopback(ctx, netns, uint16(port))
	netns.Close() // nil for the host's, which Close permits
	place.connected()
	if err != nil {
		return nil, err
	}

	return relay(ctx, from, to, pod)
}

// dialLoopback connects over IPv4 or IPv6: a server may listen on either, and drop what comes over
// the other.
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
	defer func() { // the other dial
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

// relay copies from and to a client, and a connection to a pod.
func relay(ctx context.Context, from io.Reader, to io.Writer, pod net.Conn) (discarded <-chan struct{}, err error) {
	defer pod.Close()

	stop := context.AfterFunc(ctx, func() { pod.Close() })
	defer stop()

	answers := &silenceReader{Conn: pod, timeout: halfClosed}
	done := make(chan struct{})
	go func() {
		defer close(done)

		_, _ = io.Copy(pod, from) // its end, however it came, is passed on
		if half, ok := pod.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}

		answers.begin()
		// Data that nobody reads would block the other connections of the session.
		_, _ = io.Copy(io.Discard, from)
	}()

	err = copyChunks(to, answers)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("the pod has been silent for %v since the client ended its side", halfClosed)
	case errors.Is(err, io.ErrClosedPipe), errors.Is(err, net.ErrClosed), ctx.Err() != nil:
		err = nil // the client is gone
	}

	return done, err
}

// copyChunks copies until the end of r.
func copyChunks(w io.Writer, r io.Reader) error {
	c := chunkPool.Get().(*chunk)
	defer chunkPool.Put(c)

	for {
		n, err := r.Read(c.space())
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

// silenceReader fails when a connection is silent for the timeout after begin.
type silenceReader struct {
	net.Conn
	timeout time.Duration
	begun   atomic.Bool
}

func (s *silenceReader) begin() {
	s.begun.Store(true)
	_ = s.SetReadDeadline(time.Now().Add(s.timeout))
}

func (s *silenceReader) Read(p []byte) (int, error) {
	if s.begun.Load() {
		_ = s.SetReadDeadline(time.Now().Add(s.timeout))
	}
	return s.Conn.Read(p)
}
