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

// proxy stands between a daemon and its engine. Requests whose path ends in a suffix wait until
// their client gives up.
type proxy struct {
	socket string

	mu      sync.Mutex // guards the rest
	suffix  string
	failing string                   // the suffix of the request that fails next, "" for none
	waiting int                      // requests that have waited since the last hang
	now     int                      // requests that wait now
	late    map[string]chan struct{} // suffix: closed when its requests are carried out
	silent  map[*quiet]bool          // event streams that are open, and whether they say nothing
}

// newProxy serves on a socket beside the engine's until the end of the test.
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
				p.left()
				return
			}

			if carryOut := p.delayed(r.URL.Path); carryOut != nil {
				p.serveLate(forward, w, r, carryOut)
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

// fail has the next request whose path ends in a suffix fail.
func (p *proxy) fail(suffix string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failing = suffix
}

// fails says whether a request is the one that is to fail.
func (p *proxy) fails(path string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failing == "" || !strings.HasSuffix(path, p.failing) {
		return false
	}
	p.failing = ""
	return true
}

// left counts a request whose client has given up.
func (p *proxy) left() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now--
}

// hang has requests wait from now on; "" lets all pass.
func (p *proxy) hang(suffix string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.suffix, p.waiting = suffix, 0
}

// waits is how many requests wait now.
func (p *proxy) waits() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

// waited is how many requests have waited since the last hang.
func (p *proxy) waited() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waiting
}

// quiet is the answer of an event stream that may fall silent without an end.
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

// Unwrap is for http.ResponseController.
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

// silence has the event streams that are open say nothing more.
func (p *proxy) silence() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for q := range p.silent {
		p.silent[q] = true
	}
}

// runtimeReady is the condition of Status with its reason.
func (n *node) runtimeReady(t *testing.T) (bool, string) {
	t.Helper()
	c := n.condition(t, runtimeapi.RuntimeReady)
	return c.Status, c.Message
}

// TestHangingInspect: the engine hangs on one container, at rest and while the daemon starts.
// Everything else answers as usual, and the container is described once the engine goes on.
func TestHangingInspect(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := hanging(t, n)
		sick := h.startNamed(t, h.sandbox, h.pod, "sick", sh("sleep 1000"))
		well := h.startNamed(t, h.sandbox, h.pod, "well", sh("sleep 1000"))

		h.proxy.hang("/containers/" + sick + "/json")
		h.docker(t, "kill", sick)
		eventually(t, "the engine is asked for what hangs", func() bool { return h.proxy.waited() > 0 })
		h.othersAnswer(t, "at-rest")
		h.docker(t, "kill", well)
		h.waitExited(t, well)

		h.restart(t)
		h.othersAnswer(t, "after-start")
		if s := h.containerStatus(t, sick); s.State != runtimeapi.ContainerState_CONTAINER_EXITED ||
			s.ExitCode != 137 || s.Metadata.Name != "sick" {
			t.Errorf("from the list alone: %v", s)
		}

		h.proxy.hang("")
		described := func() bool { // the list knows no time of the start
			s := h.containerStatus(t, sick)
			return s.StartedAt != s.CreatedAt
		}
		if !within(2*time.Minute, described) {
			t.Errorf("not described after the engine went on: %v", h.containerStatus(t, sick))
		}

		h.end(t)
	})
}

// TestSilentEvents: the event stream stays open and says nothing more. A dead container is reported
// within 30 s.
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
			t.Errorf("a dead container is not reported within 30 s")
		}

		t.Logf("reported after %s", time.Since(begin))
		n.removePod(t, sandbox)
		n.assertNothingLeft(t, pod)
	})
}

// TestHangingEngine stops dockerd with SIGSTOP. The runtime is not ready within 20 s, and ready
// within 5 s of SIGCONT.
func TestHangingEngine(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		pod := n.podConfig(t)
		sandbox := n.runPod(t, pod)
		n.own(t).Signal(t, "STOP")
		begin := time.Now()
		eventually(t, "RuntimeReady false", func() bool { ok, _ := n.runtimeReady(t); return !ok })
		if d := time.Since(begin); d > 20*time.Second {
			t.Errorf("the engine's hang was seen after %s", d)
		}

		n.own(t).Signal(t, "CONT")
		begin = time.Now()
		eventually(t, "RuntimeReady true", func() bool { ok, _ := n.runtimeReady(t); return ok })
		if d := time.Since(begin); d > 5*time.Second {
			t.Errorf("the engine's return was seen after %s", d)
		}

		n.podStatus(t, sandbox)
		n.removePod(t, sandbox)
		n.assertNothingLeft(t, pod)
	})
}
