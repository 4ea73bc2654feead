// Package proxy stands between a daemon and its engine in tests. It passes requests on, observes
// them, and breaks those that a test chooses.
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

// Fault is what happens to one request. The zero value passes it on.
type Fault struct {
	Delay time.Duration // before the request reaches the engine
	Hang  bool          // no answer until Break is called again or the client gives up
	// with Hang: the engine gets the request in the end even if its client has gone
	Late bool
	Cut  bool // close the connection in place of an answer
	// answer with this status in place of the engine's; 0 for the engine's own
	Status int
	After  bool // with Cut or Status: the engine has served the request before
	// close the connection after so many bytes of the body; 0 for the whole body
	Truncate int
	Silent   bool // swallow the data of event streams, open ones too
	Reorder  bool // let each event of a stream pass after the one behind it
}

// Proxy is one socket before an engine's. It is safe for concurrent use.
type Proxy struct {
	Socket string

	forward *httputil.ReverseProxy

	mu      sync.Mutex // guards the rest
	choose  func(*http.Request) Fault
	changed chan struct{} // closed and renewed by Break
	before  func(*http.Request)
	after   func(*http.Request)
	streams map[*stream]bool // event streams that are open
}

// faultKey is the key of a request's Fault in its context.
type faultKey struct{}

// errReplaced marks an answer that is replaced by a fault.
var errReplaced = errors.New("replaced by the test")

// Start serves on socket, in front of the engine that listens on the socket engine, until the test
// ends.
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
	p.forward.ModifyResponse = p.answer
	p.forward.ErrorHandler = fail
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

// Break chooses the fault of each request from now on; nil passes all on. What hangs goes on.
func (p *Proxy) Break(choose func(*http.Request) Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.choose = choose
	close(p.changed)
	p.changed = make(chan struct{})
}

// Observe calls before when a request has come, and after when the engine has answered it. The
// request, or its answer, waits until they return. Event streams and pings are not observed.
func (p *Proxy) Observe(before, after func(*http.Request)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.before, p.after = before, after
}

// CutStreams closes the event streams that are open.
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

// isObserved reports whether a request belongs to an operation. The others come by themselves.
func isObserved(r *http.Request) bool {
	return !strings.HasSuffix(r.URL.Path, "/events") && !strings.HasSuffix(r.URL.Path, "/_ping")
}

// fault returns the fault of a request, and a channel that is closed when another set of faults
// holds.
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
	if isStream(r) { // a silent stream opens as others do
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
			panic(http.ErrAbortHandler) // its client has gone
		}
		f = Fault{}
	}

	if !f.After && (f.Cut || f.Status != 0) {
		replace(w, f)
		return
	}

	p.forward.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), faultKey{}, f)))
}

// wait returns after d (never for 0), with the client, or when the faults change.
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

// maxDetached bounds the body of a request that may outlive its client, in bytes.
const maxDetached = 1 << 20

// detach returns a request that goes on when its client has gone. Large or hijacked ones stay as
// they are.
func detach(r *http.Request) (late *http.Request, done func()) {
	if r.ContentLength > maxDetached || r.ContentLength < 0 || r.Header.Get("Upgrade") != "" ||
		r.Method == http.MethodGet {
		return r, func() {}
	}

	b, err := io.ReadAll(r.Body)
	if err != nil {
		return r, func() {}
	}

	// Of a context that cannot end, ReverseProxy would watch the client itself.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	late = r.Clone(ctx)
	late.Body = io.NopCloser(bytes.NewReader(b))

	return late, cancel
}

// replace answers a request in place of the engine.
func replace(w http.ResponseWriter, f Fault) {
	if f.Cut {
		panic(http.ErrAbortHandler) // closes the connection
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(f.Status)
	_, _ = io.WriteString(w, `{"message":"broken by the test"}`)
}

// answer handles the engine's answer before the client gets it.
func (p *Proxy) answer(res *http.Response) error {
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
		res.Body = &truncated{ReadCloser: res.Body, rest: f.Truncate}
	}

	return nil
}

// fail answers a request that the engine has not answered, or whose answer is replaced. An engine
// that is down closes the connection.
func fail(w http.ResponseWriter, r *http.Request, err error) {
	f, _ := r.Context().Value(faultKey{}).(Fault)
	if !errors.Is(err, errReplaced) {
		f = Fault{Cut: true}
	}
	replace(w, f)
}

// errTruncated ends a body that is cut.
var errTruncated = errors.New("truncated by the test")

// truncated is a body that ends early, with an error.
type truncated struct {
	io.ReadCloser
	rest int
}

// Read implements io.Reader.
func (t *truncated) Read(b []byte) (int, error) {
	if t.rest <= 0 {
		return 0, errTruncated
	}
	n, err := t.ReadCloser.Read(b[:min(len(b), t.rest)])
	t.rest -= n
	return n, err
}

// stream is the body of an event stream. Faults hold for it also when it was opened before them.
type stream struct {
	body    io.ReadCloser
	proxy   *Proxy
	request *http.Request
	held    []byte // an event that waits for the one behind it
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
