package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// get sends a request to a handler and returns status and body.
func get(h http.Handler, path string) (int, string) {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

func newEndpoint() *endpoint {
	return &endpoint{metrics: prometheus.NewRegistry(), log: slog.New(slog.DiscardHandler)}
}

func TestProfilesOnUnixSocketOnly(t *testing.T) {
	for address, want := range map[string]int{
		"unix://" + filepath.Join(t.TempDir(), "m.sock"): http.StatusOK,
		"tcp://127.0.0.1:0": http.StatusNotFound,
	} {
		t.Run(address, func(t *testing.T) {
			l, err := listenEndpoint(address)
			if err != nil {
				t.Fatal(err)
			}

			ctx, stop := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- newEndpoint().serve(ctx, l) }()
			c := http.Client{Transport: &http.Transport{
				DisableKeepAlives: true,
				DialContext: func(context.Context, string, string) (net.Conn, error) {
					return net.Dial(l.Addr().Network(), l.Addr().String())
				},
			}}

			for path, want := range map[string]int{
				"/metrics": http.StatusOK, "/healthz": http.StatusOK, "/readyz": http.StatusOK,
				"/debug/pprof/": want, "/debug/pprof/heap": want,
				"/debug/pprof/cmdline": want, "/debug/pprof/symbol": want,
			} {
				r, err := c.Get("http://daemon" + path)
				if err != nil {
					t.Fatal(err)
				}

				r.Body.Close()
				if r.StatusCode != want {
					t.Errorf("%s: got status %d, want %d", path, r.StatusCode, want)
				}
			}

			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestListenEndpoint(t *testing.T) {
	file := filepath.Join(t.TempDir(), "m.sock")
	l, err := listenEndpoint("unix://" + file)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}

	if _, err := listenEndpoint("unix://" + file); err == nil || !strings.Contains(err.Error(), metricsFlag) {
		t.Errorf("second daemon: got error %v", err)
	}

	if l, err := listenEndpoint(""); l != nil || err != nil {
		t.Errorf("empty address: got %v, %v", l, err)
	}
}

func TestHealthChecks(t *testing.T) {
	e := newEndpoint()
	var broken error
	e.ready = []check{
		{"engine", func(context.Context) error { return broken }},
		{"network", func(context.Context) error { return nil }},
	}

	h := e.handler(false)
	if code, text := get(h, "/readyz"); code != http.StatusOK || text != "engine: ok\nnetwork: ok\n" {
		t.Errorf("%d, %s", code, text)
	}

	broken = errors.New("Docker does not answer; start it")
	if code, text := get(h, "/readyz"); code != http.StatusServiceUnavailable ||
		text != "engine: Docker does not answer; start it\nnetwork: ok\n" {
		t.Errorf("%d, %s", code, text)
	}

	if code, text := get(h, "/readyz?exclude=engine"); code != http.StatusOK || text != "network: ok\n" {
		t.Errorf("%d, %s", code, text)
	}
}

func TestIsRemote(t *testing.T) {
	for address, want := range map[string]bool{"127.0.0.1:0": false, "[::1]:0": false, "0.0.0.0:0": true} {
		t.Run(address, func(t *testing.T) {
			l, err := net.Listen("tcp", address)
			if err != nil {
				t.Fatal(err)
			}

			if got := isRemote(l); got != want {
				t.Errorf("got %v, want %v", got, want)
			}

			l.Close()
		})
	}
}

// TestEndpointWithoutEngine requests all pages of a daemon without an engine.
func TestEndpointWithoutEngine(t *testing.T) {
	p, err := wire(configure(t, t.TempDir(), "--network-plugin="), "cri-dockerd 1 (x)",
		slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	}()

	h := p.endpoint.handler(true)
	if code, text := get(h, "/healthz"); code != http.StatusOK || !strings.Contains(text, "view: ok") {
		t.Errorf("healthz: %d, %s", code, text)
	}

	if code, text := get(h, "/readyz"); code != http.StatusServiceUnavailable ||
		!strings.Contains(text, "engine: not yet connected to Docker") || !strings.Contains(text, "network: ok") {
		t.Errorf("readyz: %d, %s", code, text)
	}

	_, text := get(h, "/metrics")
	for _, want := range []string{
		`cri_dockerd_build_info{`, `version="1 (x)"`, "go_goroutines", "process_resident_memory_bytes",
		"cri_dockerd_image_pulls_active 0",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
}

func TestRecoveryTimer(t *testing.T) {
	var r recoveryTimer
	r.begin()
	if err := r.check(time.Hour); err != nil {
		t.Errorf("before the timeout: %v", err)
	}

	r.start.Store(time.Now().Add(-2 * time.Hour).UnixNano())
	if err := r.check(time.Hour); err == nil || !strings.Contains(err.Error(), "2h0m0s") {
		t.Errorf("after the timeout: got error %v", err)
	}

	r.end()
	if err := r.check(0); err != nil {
		t.Errorf("after the end: %v", err)
	}
}
