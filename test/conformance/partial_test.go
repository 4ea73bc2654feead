package conformance

import (
	"context"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// proxy is a proxy between a daemon and its engine. Requests with a path suffix hang until their
// client gives up.
type proxy struct {
	socket string

	mu      sync.Mutex // guards the following
	suffix  string
	failing string                   // path suffix of the next request to fail, "" for none
	waiting int                      // requests that hung since the last call of hang
	now     int                      // hanging requests
	late    map[string]chan struct{} // path suffix to the channel that releases its requests
	silent  map[*quiet]bool          // open event streams, true if silenced
}

// newProxy serves on another socket of the engine until the end of the test.
func (n *node) newProxy(t *testing.T) *proxy {
	t.Helper()
	engine := n.own(t).Socket
	p := &proxy{socket: filepath.Join(n.tempDir(t), "proxy.sock")}
	l, err := net.Listen("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}

	forward := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "engine"})
	forward.FlushInterval = -1 // events
	forward.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", engine)
	}}
	srv := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if p.fails(r.URL.Path) {
				http.Error(w, `{"message":"failed by the test"}`, http.StatusInternalServerError)
				return
			}

			if p.hangs(r.URL.Path) {
				<-r.Context().Done()
				p.abandon()
				return
			}

			if released := p.delayed(r.URL.Path); released != nil {
				p.serveLate(forward, w, r, released)
				return
			}

			if strings.HasSuffix(r.URL.Path, "/events") && r.URL.Query().Get("until") == "" {
				q := &quiet{ResponseWriter: w, proxy: p}
				p.open(q)
				defer p.close(q)
				w = q
			}

			forward.ServeHTTP(w, r)
		}),
	}

	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })

	return p
}

func (p *proxy) hangs(path string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()

	if p.suffix == "" || !strings.HasSuffix(path, p.suffix) {
		return false
	}

	p.waiting++
	p.now++

	return true
}

// fail makes the next request with a path suffix fail.
func (p *proxy) fail(suffix string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failing = suffix
}

// fails reports whether a request must fail.
func (p *proxy) fails(path string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failing == "" || !strings.HasSuffix(path, p.failing) {
		return false
	}
	p.failing = ""
	return true
}

// abandon records that the client of a hanging request has given up.
func (p *proxy) abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now--
}

// hang makes all new requests with a path suffix hang; "" lets all pass.
func (p *proxy) hang(suffix string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.suffix, p.waiting = suffix, 0
}

// hanging returns the number of hanging requests.
func (p *proxy) hanging() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

// totalHanging returns the number of requests that hung since the last call of hang.
func (p *proxy) totalHanging() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waiting
}

// quiet is the response of an event stream. The proxy can silence it without closing it.
type quiet struct {
	http.ResponseWriter
	proxy *proxy
}

// Write implements http.ResponseWriter.
func (q *quiet) Write(b []byte) (int, error) {
	q.proxy.mu.Lock()
	silent := q.proxy.silent[q]
	q.proxy.mu.Unlock()
	if silent {
		return len(b), nil
	}
	return q.ResponseWriter.Write(b)
}

// Unwrap supports http.ResponseController.
func (q *quiet) Unwrap() http.ResponseWriter { return q.ResponseWriter }

func (p *proxy) open(q *quiet) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.silent == nil {
		p.silent = map[*quiet]bool{}
	}
	p.silent[q] = false
}

func (p *proxy) close(q *quiet) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.silent, q)
}

// silence suppresses all further events of the open event streams.
func (p *proxy) silence() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for q := range p.silent {
		p.silent[q] = true
	}
}

// runtimeReady returns the condition RuntimeReady and its message.
func (n *node) runtimeReady(t *testing.T) (bool, string) {
	t.Helper()
	c := n.condition(t, runtimeapi.RuntimeReady)
	return c.Status, c.Message
}

// TestHangingInspect has an engine that hangs on one container, at rest and during the start of the
// daemon. Other calls work as usual, and the container is inspected once the engine responds again.
func TestHangingInspect(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := newHangNode(t, n)
		stuck := h.startNamed(t, h.sandbox, h.pod, "stuck", sh("sleep 1000"))
		healthy := h.startNamed(t, h.sandbox, h.pod, "healthy", sh("sleep 1000"))

		h.proxy.hang("/containers/" + stuck + "/json")
		h.docker(t, "kill", stuck)
		eventually(t, "a hanging request", func() bool { return h.proxy.totalHanging() > 0 })
		h.assertOthersWork(t, "at-rest")
		h.docker(t, "kill", healthy)
		h.waitExited(t, healthy)

		h.restart(t)
		h.assertOthersWork(t, "after-start")
		if s := h.containerStatus(t, stuck); s.State != runtimeapi.ContainerState_CONTAINER_EXITED ||
			s.ExitCode != 137 || s.Metadata.Name != "stuck" {
			t.Errorf("status from the list alone: %v", s)
		}

		h.proxy.hang("")
		inspected := func() bool { // a list has no start time
			s := h.containerStatus(t, stuck)
			return s.StartedAt != s.CreatedAt
		}
		if !within(2*time.Minute, inspected) {
			t.Errorf("status without an inspect after the engine responds: %v", h.containerStatus(t, stuck))
		}

		h.end(t)
	})
}

// TestSilentEvents has an event stream that stays open without further events. The exit of a
// container is still reported within 30 s.
func TestSilentEvents(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := n.newProxy(t)
		n = n.withDaemon(t, "--docker-endpoint=unix://"+p.socket)
		pod := n.podConfig(t)
		sandbox := n.runPod(t, pod)
		c := n.start(t, sandbox, pod, sh("sleep 1000"))
		p.silence()
		n.docker(t, "kill", c)

		begin := time.Now()
		exited := func() bool { return n.containerStatus(t, c).State == runtimeapi.ContainerState_CONTAINER_EXITED }
		if !within(30*time.Second, exited) {
			t.Error("the exit was not reported within 30 s")
		}

		t.Logf("exit reported after %s", time.Since(begin))
		n.removePod(t, sandbox)
		n.assertNoLeftovers(t, pod)
	})
}

// TestHangingEngine stops dockerd with SIGSTOP. RuntimeReady becomes false within 20 s, and true
// within 5 s of SIGCONT.
func TestHangingEngine(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		pod := n.podConfig(t)
		sandbox := n.runPod(t, pod)
		n.own(t).Signal(t, "STOP")
		begin := time.Now()
		eventually(t, "RuntimeReady false", func() bool { ok, _ := n.runtimeReady(t); return !ok })
		if d := time.Since(begin); d > scaled(20*time.Second) {
			t.Errorf("RuntimeReady became false after %s, want at most 20 s", d)
		}

		n.own(t).Signal(t, "CONT")
		begin = time.Now()
		eventually(t, "RuntimeReady true", func() bool { ok, _ := n.runtimeReady(t); return ok })
		if d := time.Since(begin); d > scaled(5*time.Second) {
			t.Errorf("RuntimeReady became true after %s, want at most 5 s", d)
		}

		n.podStatus(t, sandbox)
		n.removePod(t, sandbox)
		n.assertNoLeftovers(t, pod)
	})
}
