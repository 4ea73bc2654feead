package conformance

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// delay holds requests with a path suffix back until release. The engine then gets them even if
// their client has given up.
func (p *proxy) delay(suffix string) (release func()) {
	p.mu.Lock()
	defer p.mu.Unlock()

	released := make(chan struct{})
	p.late, p.waiting = map[string]chan struct{}{suffix: released}, 0

	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.late = nil
		close(released)
	})
}

func (p *proxy) delayed(path string) (released <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()

	for suffix, c := range p.late {
		if strings.HasSuffix(path, suffix) {
			p.waiting++
			return c
		}
	}

	return nil
}

// serveLate forwards a request without a body, even if its client has given up.
func (p *proxy) serveLate(forward http.Handler, w http.ResponseWriter, r *http.Request, released <-chan struct{}) {
	later := r.Clone(context.WithoutCancel(r.Context()))
	later.Body = http.NoBody
	response := httptest.NewRecorder()
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-released
		forward.ServeHTTP(response, later)
	}()

	select {
	case <-done:
		w.WriteHeader(response.Code)
		_, _ = w.Write(response.Body.Bytes())
	case <-r.Context().Done():
	}
}

// createLimited creates a container with a limit on huge pages. Without a hugetlb control group the
// machine cannot enforce it, and the container must not run. The returned function reports whether
// the limit is enforced or the container has exited.
func (n *node) createLimited(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, name string,
) (id string, isEnforced func() bool) {
	t.Helper()
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Metadata.Name = name
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}},
	}
	id = n.create(t, pod, cfg, cc)
	if !n.hasHugepageLimits(t) {
		return id, func() bool { return n.containerStatus(t, id).State == runtimeapi.ContainerState_CONTAINER_EXITED }
	}

	return id, func() bool { return n.hugepageLimit(t, id, "2MB") == "4194304" }
}

// createPrinter creates a container that prints a line. The returned function reports whether its
// log has the line.
func (n *node) createPrinter(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, name string,
) (id string, isLogged func() bool) {
	t.Helper()
	cc := n.containerConfig(sh("echo it runs; sleep 1000"))
	cc.Metadata.Name, cc.LogPath = name, name+".log"
	id = n.create(t, pod, cfg, cc)
	path := n.logPath(cfg, cc)

	return id, func() bool {
		return strings.Contains(n.run(t, "sh", "-c", "cat '"+path+"' 2>/dev/null || true"), "it runs")
	}
}

// TestLateStart has the engine start containers after their StartContainer has given up, and after
// a crash of the daemon during the call. The containers get their log and their limits, or do not
// run.
func TestLateStart(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := n.newProxy(t)
		n = n.withDaemon(t, "--docker-endpoint=unix://"+p.socket, "--container-log=json-file")
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)

		for _, crash := range []bool{false, true} {
			name := map[bool]string{false: "given-up", true: "crashed"}[crash]
			printer, isLogged := n.createPrinter(t, pod, cfg, name)
			limited, isEnforced := n.createLimited(t, pod, cfg, name+"-limited")
			release := p.delay("/start")
			ctx, cancel := context.WithCancel(t.Context())
			var calls sync.WaitGroup
			for _, id := range []string{printer, limited} {
				calls.Go(func() {
					if _, err := n.Runtime.StartContainer(ctx,
						&runtimeapi.StartContainerRequest{ContainerId: id}); err == nil {
						t.Errorf("%s: StartContainer succeeded", name)
					}
				})
			}

			eventually(t, "both start requests", func() bool { return p.totalHanging() == 2 })
			if crash {
				n.Kill(t)
			}

			cancel()
			calls.Wait()
			if !crash {
				if err := n.reopen(t, printer); err == nil { // it also waits for the end of the StartContainer call
					t.Errorf("%s: ReopenContainerLog of a created container succeeded", name)
				}
				// StartContainer has already created a link.
				n.run(t, "sh", "-c", "rm -f '"+cfg.LogDirectory+"/"+name+".log'")
			}

			release()
			eventually(t, name+": start of both containers", func() bool {
				return n.inspect(t, printer, ".State.Running") == "true" &&
					!strings.HasPrefix(n.inspect(t, limited, ".State.StartedAt"), "0001")
			})

			if crash {
				n.Restart(t)
			}

			eventually(t, name+": log at the kubelet's path", isLogged)
			eventually(t, name+": enforced limit or exit of the container", isEnforced)
			if got := n.containerStatus(t, printer).State; got != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("%s: the container without limits is %v, want running", name, got)
			}
		}

		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
	})
}
