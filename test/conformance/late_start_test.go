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

// delay has requests whose path ends in a suffix reach the engine only after release, also if their
// client has given up by then.
func (p *proxy) delay(suffix string) (release func()) {
	p.mu.Lock()
	defer p.mu.Unlock()

	carryOut := make(chan struct{})
	p.late, p.waiting = map[string]chan struct{}{suffix: carryOut}, 0

	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.late = nil
		close(carryOut)
	})
}

func (p *proxy) delayed(path string) (carryOut <-chan struct{}) {
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

// serveLate forwards a request without a body, whatever becomes of its client.
func (p *proxy) serveLate(forward http.Handler, w http.ResponseWriter, r *http.Request, carryOut <-chan struct{}) {
	later := r.Clone(context.WithoutCancel(r.Context()))
	later.Body = http.NoBody
	answer := httptest.NewRecorder()
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-carryOut
		forward.ServeHTTP(answer, later)
	}()

	select {
	case <-done:
		w.WriteHeader(answer.Code)
		_, _ = w.Write(answer.Body.Bytes())
	case <-r.Context().Done():
	}
}

// unkept is a container with a limit that this machine cannot keep if it has no control group for
// huge pages: it must not run.
func (n *node) unkept(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, name string,
) (id string, keeps func() bool) {
	t.Helper()
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Metadata.Name = name
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}},
	}
	id = n.create(t, pod, cfg, cc)
	if n.run(t, "sh", "-c", "ls -d /sys/fs/cgroup/hugetlb 2>/dev/null || true") == "" {
		return id, func() bool { return n.containerStatus(t, id).State == runtimeapi.ContainerState_CONTAINER_EXITED }
	}

	return id, func() bool {
		return strings.TrimSpace(n.exec(t, id, "cat", "/sys/fs/cgroup/hugetlb/hugetlb.2MB.limit_in_bytes")) == "4194304"
	}
}

// printer is a container that prints a line, and its log.
func (n *node) printer(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, name string,
) (id string, logged func() bool) {
	t.Helper()
	cc := n.containerConfig(sh("echo it runs; sleep 1000"))
	cc.Metadata.Name, cc.LogPath = name, name+".log"
	id = n.create(t, pod, cfg, cc)
	path := n.logPath(cfg, cc)

	return id, func() bool {
		return strings.Contains(n.run(t, "sh", "-c", "cat '"+path+"' 2>/dev/null || true"), "it runs")
	}
}

// TestLateStart: the engine starts containers after their StartContainer has given up, and after
// the daemon was killed in the middle of it. They get their log and their limits, or do not run.
func TestLateStart(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.needsV1(t)
		p := n.newProxy(t)
		n = n.withDaemon(t, "--docker-endpoint=unix://"+p.socket, "--container-log=json-file")
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)

		for _, crash := range []bool{false, true} {
			name := map[bool]string{false: "given-up", true: "crashed"}[crash]
			printer, logged := n.printer(t, pod, cfg, name)
			unkept, keeps := n.unkept(t, pod, cfg, name+"-limited")
			release := p.delay("/start")
			ctx, cancel := context.WithCancel(t.Context())
			var calls sync.WaitGroup
			for _, id := range []string{printer, unkept} {
				calls.Go(func() {
					if _, err := n.Runtime.StartContainer(ctx,
						&runtimeapi.StartContainerRequest{ContainerId: id}); err == nil {
						t.Errorf("%s: StartContainer succeeded", name)
					}
				})
			}

			eventually(t, "the engine is asked for both", func() bool { return p.waited() == 2 })
			if crash {
				n.Kill(t)
			}

			cancel()
			calls.Wait()
			if !crash {
				if err := n.reopen(t, printer); err == nil { // it waits until the daemon has ended the call, too
					t.Errorf("%s: the log of a container that does not run was reopened", name)
				}
				// StartContainer has made a link already
				n.run(t, "sh", "-c", "rm -f '"+cfg.LogDirectory+"/"+name+".log'")
			}

			release()
			eventually(t, name+": Docker has started both", func() bool {
				return n.inspect(t, printer, ".State.Running") == "true" &&
					!strings.HasPrefix(n.inspect(t, unkept, ".State.StartedAt"), "0001")
			})

			if crash {
				n.Restart(t)
			}

			eventually(t, name+": the log is where the kubelet reads it", logged)
			eventually(t, name+": the limit is kept, or the container does not run", keeps)
			if got := n.containerStatus(t, printer).State; got != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("%s: a container without limits is %v", name, got)
			}
		}

		n.removePod(t, pod)
		n.assertNothingLeft(t, cfg)
	})
}
