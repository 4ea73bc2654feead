// Package proxy is a proxy between a daemon and its engine for tests. It forwards requests,
// observes them, and injects faults.
package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"time"

	"cri-dockerd/test/engines"
)

// Fault is a fault of one request. The zero value is no fault.
type Fault struct {
	Delay time.Duration // before the request reaches the engine
	Hang  bool          // wait for the next call of Break or the end of the client
	// with Hang: send the request to the engine later, even after the end of the client
	Late bool
	Cut  bool // close the connection instead of responding
	// respond with this status instead of the engine's; 0 for the engine's own
	Status int
	After  bool // with Cut or Status: send the request to the engine first
	// close the connection after this number of bytes of the body; 0 for the whole body
	Truncate int
	Silent   bool // drop the data of event streams, including open ones
	Reorder  bool // swap pairs of events of a stream
}

// Proxy is a socket in front of an engine's socket. It is safe for concurrent use.
type Proxy struct {
	Socket string

	forward *httputil.ReverseProxy

	mu      sync.Mutex // guards the following fields
	choose  func(*http.Request) Fault
	changed chan struct{} // closed and renewed by Break
	before  func(*http.Request)
	after   func(*http.Request)
	streams map[*stream]bool // open event streams
}

// faultKey is the key of a request's Fault in its context.
type faultKey struct{}

// errReplaced marks a response replaced by a fault.
var errReplaced = errors.New("replaced by the test")

// Start starts a proxy on socket for the engine on the socket engine. It runs until the test ends.
func Start(tb engines.TB, socket, engine string) *Proxy {
	tb.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		tb.Fatalf("proxy: %v", err)
		return nil
	}

	p := &Proxy{Socket: socket, changed: make(chan struct{}), streams: map[*stream]bool{}}
	p.forward = httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "engine"})
	p.forward.FlushInterval = -1 // events
	p.forward.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	p.forward.ModifyResponse = p.modifyResponse
	p.forward.ErrorHandler = handleError
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", engine)
	}}
	p.forward.Transport = transport

	srv := &http.Server{
		Handler:           p,
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	}

	go func() { _ = srv.Serve(l) }()
	tb.Cleanup(func() {
		p.Break(nil)
		srv.Close()
		transport.CloseIdleConnections()
	})

	return p
}

// Break sets the function to choose the fault of each future request, nil for no faults. Hanging
// requests continue.
func (p *Proxy) Break(choose func(*http.Request) Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.choose = choose
	close(p.changed)
	p.changed = make(chan struct{})
}

// Observe sets functions to call before each request and after each response of the engine. The
// request or response waits until they return. Event streams and pings are not observed.
func (p *Proxy) Observe(before, after func(*http.Request)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.before, p.after = before, after
}

// CutStreams closes all open event streams.
func (p *Proxy) CutStreams() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.streams {
		s.body.Close()
	}
}

// isStream reports whether a request asks for events without an end.
func isStream(r *http.Request) bool {
	return strings.HasSuffix(r.URL.Path, "/events") && r.URL.Query().Get("until") == ""
}

// isObserved reports whether a request belongs to an operation, unlike periodic requests.
func isObserved(r *http.Request) bool {
	return !strings.HasSuffix(r.URL.Path, "/events") && !strings.HasSuffix(r.URL.Path, "/_ping")
}

// fault returns the fault of a request, and a channel closed by the next Break.
func (p *Proxy) fault(r *http.Request) (Fault, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.choose == nil {
		return Fault{}, p.changed
	}
	return p.choose(r), p.changed
}

// ServeHTTP implements http.Handler.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	before := p.before
	p.mu.Unlock()
	if before != nil && isObserved(r) {
		before(r)
	}

	f, changed := p.fault(r)
	if isStream(r) { // silent streams open normally
		f.Hang = f.Hang && !f.Silent
	}

	if f.Late {
		late, done := detach(r)
		defer done()
		r = late
	}

	if f.Delay > 0 {
		wait(r, changed, f.Delay)
	}

	if f.Hang {
		wait(r, changed, 0)
		if r.Context().Err() != nil {
			panic(http.ErrAbortHandler) // the client has disconnected
		}
		f = Fault{}
	}

	if !f.After && (f.Cut || f.Status != 0) {
		replace(w, f)
		return
	}

	p.forward.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), faultKey{}, f)))
}

// wait waits for d (forever if 0), the end of the client or the next Break.
func wait(r *http.Request, changed <-chan struct{}, d time.Duration) {
	var timeout <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timeout = t.C
	}

	select {
	case <-timeout:
	case <-changed:
	case <-r.Context().Done():
	}
}

// maxDetached is the maximum size of the body of a detached request in bytes.
const maxDetached = 1 << 20

// detach returns a request independent of its client. It returns large and hijacked requests
// unchanged.
func detach(r *http.Request) (late *http.Request, done func()) {
	if r.ContentLength > maxDetached || r.ContentLength < 0 || r.Header.Get("Upgrade") != "" ||
		r.Method == http.MethodGet {
		return r, func() {}
	}

	b, err := io.ReadAll(r.Body)
	if err != nil {
		return r, func() {}
	}

	// ReverseProxy would watch the client if the context could not end.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	late = r.Clone(ctx)
	late.Body = io.NopCloser(bytes.NewReader(b))

	return late, cancel
}

// replace responds to a request instead of the engine.
func replace(w http.ResponseWriter, f Fault) {
	if f.Cut {
		panic(http.ErrAbortHandler) // closes the connection
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(f.Status)
	_, _ = io.WriteString(w, `{"message":"broken by the test"}`)
}

// modifyResponse handles a response of the engine before it is sent to the client.
func (p *Proxy) modifyResponse(res *http.Response) error {
	p.mu.Lock()
	after := p.after
	p.mu.Unlock()
	if after != nil && isObserved(res.Request) {
		after(res.Request)
	}

	f, _ := res.Request.Context().Value(faultKey{}).(Fault)
	switch {
	case f.After && (f.Cut || f.Status != 0):
		return errReplaced
	case isStream(res.Request):
		res.Body = p.open(res)
	case f.Truncate > 0 && res.StatusCode != http.StatusSwitchingProtocols:
		res.Body = &truncated{ReadCloser: res.Body, remaining: f.Truncate}
	}

	return nil
}

// handleError responds to a request without a response of the engine, or with a replaced one. If
// the engine is down, it closes the connection.
func handleError(w http.ResponseWriter, r *http.Request, err error) {
	f, _ := r.Context().Value(faultKey{}).(Fault)
	if !errors.Is(err, errReplaced) {
		f = Fault{Cut: true}
	}
	replace(w, f)
}

// errTruncated is the error at the end of a truncated body.
var errTruncated = errors.New("truncated by the test")

// truncated is a body with an early end and an error.
type truncated struct {
	io.ReadCloser
	remaining int
}

// Read implements io.Reader.
func (t *truncated) Read(b []byte) (int, error) {
	if t.remaining <= 0 {
		return 0, errTruncated
	}
	n, err := t.ReadCloser.Read(b[:min(len(b), t.remaining)])
	t.remaining -= n
	return n, err
}

// stream is the body of an event stream. Later faults also apply to it.
type stream struct {
	body    io.ReadCloser
	proxy   *Proxy
	request *http.Request
	held    []byte // an event delayed until after the next one
}

func (p *Proxy) open(res *http.Response) *stream {
	s := &stream{body: res.Body, proxy: p, request: res.Request}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.streams[s] = true
	return s
}

// Read implements io.Reader.
func (s *stream) Read(b []byte) (int, error) {
	for {
		n, err := s.body.Read(b)
		f, changed := s.proxy.fault(s.request)
		switch {
		case f.Silent:
			n = 0
		case f.Truncate > 0 && n > 0:
			return 0, errTruncated
		case f.Reorder && s.held == nil && err == nil:
			s.held = bytes.Clone(b[:n])
			continue
		case f.Delay > 0 && n > 0:
			wait(s.request, changed, f.Delay)
		}

		if n+len(s.held) <= len(b) {
			n += copy(b[n:], s.held)
			s.held = nil
		}

		if n > 0 || err != nil {
			return n, err
		}
	}
}

// Close implements io.Closer.
func (s *stream) Close() error {
	s.proxy.mu.Lock()
	delete(s.proxy.streams, s)
	s.proxy.mu.Unlock()
	return s.body.Close()
}
