package conformance

import (
	"context"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

func TestDaemonKilled(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		before, ip := n.containerStatus(t, c), n.podStatus(t, pod).Network.Ip
		n.Kill(t)
		n.Restart(t)
		after := n.containerStatus(t, c)
		if after.State != runtimeapi.ContainerState_CONTAINER_RUNNING || after.StartedAt != before.StartedAt {
			t.Errorf("container before %v, after %v", before, after)
		}

		if got := n.podStatus(t, pod); got.Network.GetIp() != ip ||
			got.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			t.Errorf("pod had IP %s, now %v", ip, got)
		}

		n.exec(t, c, "true")
		n.removePod(t, pod)
		n.assertNothingLeft(t, cfg)
	})
}

func TestEngineDown(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		ready := func() (bool, string) {
			s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
			if err != nil {
				t.Fatal(err)
			}

			for _, c := range s.Status.Conditions {
				if c.Type == "RuntimeReady" {
					return c.Status, c.Message
				}
			}

			t.Fatal("no RuntimeReady condition")

			return false, ""
		}

		n.own(t).Kill(t)
		begin := time.Now()
		eventually(t, "RuntimeReady false", func() bool { ok, why := ready(); return !ok && why != "" })
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("the engine's end was seen after %v", d)
		}

		if _, err := n.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); status.Code(err) !=
			codes.Unavailable {
			t.Errorf("a list without an engine: %v", err)
		}

		if code, why := n.Get(t, "/readyz"); code != http.StatusServiceUnavailable ||
			!strings.Contains(why, "engine: Docker does not answer: ") {
			t.Errorf("readyz without an engine: %d, %s", code, why)
		}

		if code, why := n.Get(t, "/healthz"); code != http.StatusOK {
			t.Errorf("healthz without an engine: %d, %s", code, why)
		}

		n.own(t).Restart(t)
		eventually(t, "RuntimeReady true", func() bool { ok, _ := ready(); return ok })
		if code, why := n.Get(t, "/readyz"); code != http.StatusOK {
			t.Errorf("readyz with the engine back: %d, %s", code, why)
		}

		n.podStatus(t, pod)
		n.removePod(t, pod)
		n.assertNothingLeft(t, cfg)
		n.removePod(t, n.runPod(t, n.podConfig(t)))
	})
}

// faults stands between the daemon and the engine and breaks one request: before it reaches the
// engine, or after the engine has done it.
type faults struct {
	mu    sync.Mutex
	match *regexp.Regexp // "METHOD path", nil: nothing breaks
	after bool
	hits  int
}

// arm breaks the next request that matches.
func (f *faults) arm(match string, after bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.match, f.after, f.hits = regexp.MustCompile(match), after, 0
}

// disarm stops breaking and says whether a request was broken.
func (f *faults) disarm() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.match = nil
	return f.hits > 0
}

func (f *faults) breaks(r *http.Request) (broken, after bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.match == nil || f.hits > 0 || !f.match.MatchString(r.Method+" "+r.URL.Path) {
		return false, false
	}
	f.hits++
	return true, f.after
}

// serve starts the proxy on a socket before the engine's.
func (f *faults) serve(t *testing.T, socket, engine string) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", engine)
	}}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "docker"})
	proxy.Transport, proxy.FlushInterval = transport, -1
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, err error) {
		http.Error(w, err.Error(), http.StatusBadGateway)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		broken, after := f.breaks(r)
		if broken && after {
			proxy.ServeHTTP(&discard{header: http.Header{}}, r)
		}

		if broken {
			http.Error(w, `{"message":"broken by the test"}`, http.StatusInternalServerError)
			return
		}

		proxy.ServeHTTP(w, r)
	})}

	go srv.Serve(l) //nolint:errcheck // ends with Close
	t.Cleanup(func() { srv.Close(); transport.CloseIdleConnections() })
}

type discard struct{ header http.Header }

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(b []byte) (int, error) { return len(b), nil }
func (d *discard) WriteHeader(int)             {}

// TestRunPodSandboxFailsAtEachStep makes RunPodSandbox fail at every step against the real engine
// and looks for what is left.
func TestRunPodSandboxFailsAtEachStep(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		f := &faults{}
		socket := filepath.Join(n.tempDir(t), "proxy.sock")
		f.serve(t, socket, n.own(t).Socket)
		plugins := brokenPlugins(t, n)
		n = n.withDaemon(t, "--docker-endpoint=unix://"+socket, "--cni-bin-dir="+plugins)
		n.removePod(t, n.runPod(t, n.podConfig(t))) // the pause image is loaded

		steps := []struct {
			name  string
			match string
			after bool
			touch string // a file that breaks a plugin
		}{
			{name: "create", match: `POST .*/containers/create`},
			{name: "create, after it was done", match: `POST .*/containers/create`, after: true},
			{name: "start", match: `POST .*/containers/[0-9a-f]+/start`},
			{name: "start, after it was done", match: `POST .*/containers/[0-9a-f]+/start`, after: true},
			{name: "inspect", match: `GET .*/containers/[0-9a-f]+/json`},
			{name: "CNI ADD of bridge", touch: "bridge.before"},
			{name: "CNI ADD of bridge, after it was done", touch: "bridge.after"},
			{name: "CNI ADD of portmap", touch: "portmap.before"},
		}

		for _, s := range steps {
			t.Run(s.name, func(t *testing.T) {
				cfg := n.podConfig(t)
				cfg.PortMappings = []*runtimeapi.PortMapping{{
					Protocol:      runtimeapi.Protocol_TCP,
					ContainerPort: 80,
					HostPort:      18090,
				}}
				if s.touch != "" {
					file := filepath.Join(plugins, s.touch)
					if err := os.WriteFile(file, nil, 0o644); err != nil {
						t.Fatal(err)
					}

					_, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
					if err == nil {
						t.Error("RunPodSandbox succeeded")
					}

					os.Remove(file)
				} else {
					f.arm(s.match, s.after)
					r, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
					if !f.disarm() {
						t.Fatal("no request was broken")
					}
					if err == nil && s.name != "inspect" { // an inspect may belong to the view, which tries again
						t.Errorf("RunPodSandbox succeeded: %v", r)
					}

					if err == nil {
						n.removePod(t, r.PodSandboxId)
					}
				}

				n.assertNothingLeft(t, cfg)
				id := n.runPod(t, cfg)
				if n.podStatus(t, id).Network.GetIp() == "" {
					t.Error("the retry has no IP")
				}

				n.removePod(t, id)
				n.assertNothingLeft(t, cfg)
			})
		}
	})
}

func TestRunPodSandboxCancelled(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		for d := 10 * time.Millisecond; d < 500*time.Millisecond; d += 35 * time.Millisecond {
			cfg := n.podConfig(t)
			ctx, cancel := context.WithTimeout(t.Context(), d)
			r, err := n.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
			cancel()
			if err == nil {
				n.removePod(t, r.PodSandboxId)
			}

			// The call may have succeeded in the moment in which its caller gave up: then the whole
			// pod is there for the retry.
			var left, whole string
			if !within(20*time.Second, func() bool {
				left, whole = n.left(t, cfg), n.wholePod(t, cfg)
				return left == "" || whole != ""
			}) {
				t.Errorf("left of a pod cancelled after %v: %s", d, left)
			}

			id := n.runPod(t, cfg)
			if whole != "" && id != whole {
				t.Errorf("cancelled after %v: the pod %s was ready, the retry made %s", d, whole, id)
			}

			n.removePod(t, id)
			n.assertNothingLeft(t, cfg)
		}
	})
}

// brokenPlugins is a folder of the standard plugins, each of which fails while a file
// <plugin>.before or <plugin>.after lies beside it.
func brokenPlugins(t *testing.T, n *node) string {
	t.Helper()
	dir := n.tempDir(t)
	for _, p := range []string{"bridge", "host-local", "portmap", "loopback"} {
		script := strings.NewReplacer("DIR", dir, "PLUGIN", p).Replace(`#!/bin/sh
fail() { echo '{"cniVersion":"0.4.0","code":99,"msg":"broken by the test"}'; exit 1; }
[ "$CNI_COMMAND" = ADD ] && [ -e DIR/PLUGIN.before ] && fail
if [ "$CNI_COMMAND" = ADD ] && [ -e DIR/PLUGIN.after ]; then /usr/lib/cni/PLUGIN >/dev/null; fail; fi
exec /usr/lib/cni/PLUGIN
`)
		engines.WriteProgram(t, filepath.Join(dir, p), script)
	}

	return dir
}
