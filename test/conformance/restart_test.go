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

// TestDaemonKilled kills and restarts the daemon under a running pod.
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
			t.Errorf("container before the restart %v, after it %v", before, after)
		}

		if got := n.podStatus(t, pod); got.Network.GetIp() != ip ||
			got.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			t.Errorf("pod had address %s, after the restart %v", ip, got)
		}

		n.exec(t, c, "true")
		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
	})
}

// TestEngineDown kills and restarts the engine and checks conditions and health endpoints.
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

			t.Fatal("Status has no condition RuntimeReady")

			return false, ""
		}

		n.own(t).Kill(t)
		begin := time.Now()
		eventually(t, "RuntimeReady false", func() bool { ok, why := ready(); return !ok && why != "" })
		if d := time.Since(begin); d > scaled(2*time.Second) {
			t.Errorf("RuntimeReady became false after %v, want at most 2 s", d)
		}

		_, err := n.Runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("ListPodSandbox without an engine: %v, want Unavailable", err)
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
			t.Errorf("readyz after the restart of the engine: %d, %s", code, why)
		}

		n.podStatus(t, pod)
		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
		n.removePod(t, n.runPod(t, n.podConfig(t)))
	})
}

// faults is a proxy between the daemon and the engine. It fails one request, before the engine gets
// it or after the engine has completed it.
type faults struct {
	mu    sync.Mutex
	match *regexp.Regexp // of "METHOD path"; nil: no request fails
	after bool
	hits  int
}

// arm makes the next matching request fail.
func (f *faults) arm(match string, after bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.match, f.after, f.hits = regexp.MustCompile(match), after, 0
}

// disarm stops failing requests and reports whether one has failed.
func (f *faults) disarm() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.match = nil
	return f.hits > 0
}

func (f *faults) shouldFail(r *http.Request) (fails, after bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.match == nil || f.hits > 0 || !f.match.MatchString(r.Method+" "+r.URL.Path) {
		return false, false
	}
	f.hits++
	return true, f.after
}

// serve starts the proxy on a socket.
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
		fails, after := f.shouldFail(r)
		if fails && after {
			proxy.ServeHTTP(&discard{header: http.Header{}}, r)
		}

		if fails {
			http.Error(w, `{"message":"failed by the test"}`, http.StatusInternalServerError)
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

// failingSteps are the failures of RunPodSandbox: of an engine request or of a network plugin.
var failingSteps = []struct {
	name  string
	match string // see faults.match
	after bool
	touch string // file that makes a plugin fail
}{
	{name: "create", match: `POST .*/containers/create`},
	{name: "create, after completion", match: `POST .*/containers/create`, after: true},
	{name: "start", match: `POST .*/containers/[0-9a-f]+/start`},
	{name: "start, after completion", match: `POST .*/containers/[0-9a-f]+/start`, after: true},
	{name: "inspect", match: `GET .*/containers/[0-9a-f]+/json`},
	{name: "CNI ADD of bridge", touch: "bridge.before"},
	{name: "CNI ADD of bridge, after completion", touch: "bridge.after"},
	{name: "CNI ADD of portmap", touch: "portmap.before"},
}

// TestRunPodSandboxFailsAtEachStep fails RunPodSandbox at every step on a real engine and checks
// for leftovers.
func TestRunPodSandboxFailsAtEachStep(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		f := &faults{}
		socket := filepath.Join(n.tempDir(t), "proxy.sock")
		f.serve(t, socket, n.own(t).Socket)
		plugins := brokenPlugins(t, n)
		n = n.withDaemon(t, "--docker-endpoint=unix://"+socket, "--cni-bin-dir="+plugins)
		n.removePod(t, n.runPod(t, n.podConfig(t))) // loads the pause image

		for _, s := range failingSteps {
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
						t.Fatal("no request matched")
					}
					if err == nil && s.name != "inspect" { // the view retries its own inspects
						t.Errorf("RunPodSandbox succeeded: %v", r)
					}

					if err == nil {
						n.removePod(t, r.PodSandboxId)
					}
				}

				n.assertNoLeftovers(t, cfg)
				id := n.runPod(t, cfg)
				if n.podStatus(t, id).Network.GetIp() == "" {
					t.Error("the retry has no IP address")
				}

				n.removePod(t, id)
				n.assertNoLeftovers(t, cfg)
			})
		}
	})
}

// TestRunPodSandboxCancelled cancels RunPodSandbox after different times and retries it.
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

			// The call may succeed just before its cancellation. The complete pod then exists for
			// the retry.
			var leftovers, whole string
			if !within(20*time.Second, func() bool {
				leftovers, whole = n.leftovers(t, cfg), n.readyPod(t, cfg)
				return leftovers == "" || whole != ""
			}) {
				t.Errorf("leftovers of a pod cancelled after %v: %s", d, leftovers)
			}

			id := n.runPod(t, cfg)
			if whole != "" && id != whole {
				t.Errorf("cancelled after %v: the retry returned %s, want the existing pod %s", d, id, whole)
			}

			n.removePod(t, id)
			n.assertNoLeftovers(t, cfg)
		}
	})
}

// brokenPlugins creates a directory with the standard plugins. Each fails while a file
// <plugin>.before or <plugin>.after exists.
func brokenPlugins(t *testing.T, n *node) string {
	t.Helper()
	dir := n.tempDir(t)
	for _, p := range []string{"bridge", "host-local", "portmap", "loopback"} {
		script := strings.NewReplacer("DIR", dir, "PLUGIN", p).Replace(`#!/bin/sh
fail() { echo '{"cniVersion":"0.4.0","code":99,"msg":"failed by the test"}'; exit 1; }
[ "$CNI_COMMAND" = ADD ] && [ -e DIR/PLUGIN.before ] && fail
if [ "$CNI_COMMAND" = ADD ] && [ -e DIR/PLUGIN.after ]; then /usr/lib/cni/PLUGIN >/dev/null; fail; fi
exec /usr/lib/cni/PLUGIN
`)
		engines.WriteProgram(t, filepath.Join(dir, p), script)
	}

	return dir
}
