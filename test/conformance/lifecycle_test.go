package conformance

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// TestRunPodSandboxTwice repeats a call with the same metadata, like a kubelet that has lost the
// response.
func TestRunPodSandboxTwice(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.runPod(t, cfg)
		r, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
		if code := status.Code(err); err == nil && r.PodSandboxId != id ||
			err != nil && code != codes.AlreadyExists && n.eng != nil {
			t.Errorf("second call: %v, %v; the first returned %s", r, err, id)
		}

		n.stopPod(t, id)
		n.removePod(t, id)
		again := n.runPod(t, cfg)
		if again == id {
			t.Error("the ID of a removed sandbox was reused")
		}

		n.removePod(t, again)
		n.assertNoLeftovers(t, cfg)
	})
}

// TestPauseRemovedWithDocker removes the pause of a pod with running containers. StopPodSandbox
// and RemovePodSandbox must still end them.
func TestPauseRemovedWithDocker(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("trap '' TERM; while true; do sleep 1; done"))
		n.docker(t, "rm", "-f", pod)
		eventually(t, "removal of the sandbox from the list", func() bool {
			r, err := n.Runtime.ListPodSandbox(t.Context(),
				&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: pod}})
			return err == nil && len(r.Items) == 0
		})

		n.stopPod(t, pod)
		if s := n.containerStatus(t, c); s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			t.Errorf("container after StopPodSandbox: %v, want exited", s.State)
		}

		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
		if id := n.runPod(t, cfg); n.podStatus(t, id).Network.GetIp() == "" {
			t.Error("the next attempt has no IP address")
		}
	})
}

// TestContainerRemovedWithDocker removes a container with docker. Stop and removal succeed.
func TestContainerRemovedWithDocker(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		n.docker(t, "rm", "-f", c)
		if _, err := n.Runtime.StopContainer(t.Context(),
			&runtimeapi.StopContainerRequest{ContainerId: c}); err != nil {
			t.Errorf("StopContainer: %v", err)
		}

		if _, err := n.Runtime.RemoveContainer(t.Context(),
			&runtimeapi.RemoveContainerRequest{ContainerId: c}); err != nil {
			t.Errorf("RemoveContainer: %v", err)
		}

		n.start(t, pod, cfg, sh("true")) // with the same name
	})
}

// TestASandboxIsNotAContainer uses the ID of a sandbox as that of a container and vice versa.
func TestASandboxIsNotAContainer(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		if r, err := n.Runtime.ContainerStatus(t.Context(),
			&runtimeapi.ContainerStatusRequest{ContainerId: pod}); status.Code(err) != codes.NotFound {
			t.Errorf("ContainerStatus of a sandbox: %v, %v", r, err)
		}

		if r, err := n.Runtime.PodSandboxStatus(t.Context(),
			&runtimeapi.PodSandboxStatusRequest{PodSandboxId: c}); status.Code(err) != codes.NotFound {
			t.Errorf("PodSandboxStatus of a container: %v, %v", r, err)
		}

		for name, call := range map[string]func() error{
			"StopContainer": func() error {
				_, err := n.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: pod})
				return err
			},
			"RemoveContainer": func() error {
				_, err := n.Runtime.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: pod})
				return err
			},
			"StopPodSandbox": func() error {
				_, err := n.Runtime.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: c})
				return err
			},
			"RemovePodSandbox": func() error {
				_, err := n.Runtime.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: c})
				return err
			},
		} {
			t.Run(name, func(t *testing.T) {
				// The ID does not exist as an object of this type, so the call has nothing to do.
				if err := call(); err != nil {
					t.Error(err)
				}
			})
		}

		if n.podStatus(t, pod).State != runtimeapi.PodSandboxState_SANDBOX_READY ||
			n.containerStatus(t, c).State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Error("the sandbox or its container was stopped with the other's ID")
		}
	})
}

// TestStopSignal stops containers with the stop_signal of the CRI.
func TestStopSignal(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t) // many runtimes lack this field
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for _, c := range []struct {
			name   string
			signal runtimeapi.Signal
			code   int32
			want   runtimeapi.Signal
		}{
			{"default", runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT, 15, runtimeapi.Signal_SIGNAL_SIGTERM},
			{"usr1", runtimeapi.Signal_SIGNAL_SIGUSR1, 10, runtimeapi.Signal_SIGNAL_SIGUSR1},
			{"rt3", runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3, 37, runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3},
		} {
			t.Run(c.name, func(t *testing.T) {
				cc := n.containerConfig(sh("trap 'exit 15' TERM; trap 'exit 10' USR1; trap 'exit 37' 37; " +
					"touch /ready; while true; do sleep 0.05; done"))
				cc.Metadata.Name, cc.LogPath, cc.StopSignal = c.name, c.name+"_0.log", c.signal
				id := n.startConfig(t, pod, cfg, cc)
				eventually(t, "set traps", func() bool {
					return n.exec(t, id, "sh", "-c", "ls /ready 2>/dev/null || true") != ""
				})

				n.stop(t, id, 10)
				if s := n.containerStatus(t, id); s.ExitCode != c.code || s.StopSignal != c.want {
					t.Errorf("exit code %d, stop_signal %v", s.ExitCode, s.StopSignal)
				}
			})
		}
	})
}

// stop stops a container with a grace period in seconds.
func (n *node) stop(t *testing.T, id string, grace int64) {
	t.Helper()
	if _, err := n.Runtime.StopContainer(t.Context(),
		&runtimeapi.StopContainerRequest{ContainerId: id, Timeout: grace}); err != nil {
		t.Errorf("StopContainer: %v", err)
	}
}

// TestStopOfAPausedContainer stops and removes containers paused with docker.
func TestStopOfAPausedContainer(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for name, grace := range map[string]int64{"graceful": 1, "killed": 0} {
			t.Run(name, func(t *testing.T) {
				id := n.startNamed(t, pod, cfg, name, sh("sleep 1000"))
				n.docker(t, "pause", id)
				begin := time.Now()
				n.stop(t, id, grace)
				if s := n.containerStatus(t, id); s.State != runtimeapi.ContainerState_CONTAINER_EXITED ||
					time.Since(begin) > scaled(10*time.Second) {
					t.Errorf("%v after the stop the container is %v", time.Since(begin), s.State)
				}
			})
		}

		id := n.startNamed(t, pod, cfg, "removed", sh("sleep 1000"))
		n.docker(t, "pause", id)
		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
	})
}

// TestStopsInParallel stops a container with a long grace period and then without one (kubectl
// delete --grace-period=0 --force). The second call ends both.
func TestStopsInParallel(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		id := n.start(t, pod, cfg, sh("trap '' TERM; touch /ready; while true; do sleep 0.05; done"))
		eventually(t, "set trap", func() bool {
			return n.exec(t, id, "sh", "-c", "ls /ready 2>/dev/null || true") != ""
		})

		gracefulStop := make(chan struct{})
		go func() { defer close(gracefulStop); n.stop(t, id, 600) }()
		begin := time.Now()
		n.stop(t, id, 0)
		<-gracefulStop

		if d := time.Since(begin); d > scaled(20*time.Second) {
			t.Errorf("the stops took %v, want at most 20 s", d)
		}
		if s := n.containerStatus(t, id); s.ExitCode != 137 {
			t.Errorf("status: %v, want exit code 137", s)
		}
	})
}

// TestRuntimeHandlers uses runtimes configured in the engine as handlers and, from API 1.42,
// containerd shims by name. An unknown handler is refused before anything is created.
func TestRuntimeHandlers(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		run := func(cfg *runtimeapi.PodSandboxConfig, handler string) (string, error) {
			r, err := n.Runtime.RunPodSandbox(t.Context(),
				&runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
			return r.GetPodSandboxId(), err
		}

		cfg := n.podConfig(t)
		_, err := run(cfg, "no-such-runtime")
		if err == nil || !strings.Contains(err.Error(), "no-such-runtime") ||
			n.eng != nil && !strings.Contains(err.Error(), "wrapped") {
			t.Errorf("unknown handler: %v", err)
		}

		n.assertNoLeftovers(t, cfg)
		n.own(t) // the following handlers exist on private engines only
		cfg = n.podConfig(t)
		id, err := run(cfg, "wrapped")
		if err != nil {
			t.Fatal(err)
		}

		if s := n.podStatus(t, id); s.RuntimeHandler != "wrapped" {
			t.Errorf("PodSandboxStatus has handler %q, want wrapped", s.RuntimeHandler)
		}

		c := n.start(t, id, cfg, sh("sleep 1000"))
		if got := strings.TrimSpace(n.docker(t, "inspect", "-f", "{{.HostConfig.Runtime}}", c)); got != "wrapped" {
			t.Errorf("runtime of the container: %q, want wrapped", got)
		}

		n.removePod(t, id)
		s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}

		names := map[string]bool{}
		for _, h := range s.RuntimeHandlers {
			names[h.Name] = true
		}

		if !names[""] || !names["wrapped"] {
			t.Errorf("handlers in Status: %v", names)
		}

		cfg = n.podConfig(t)
		id, err = run(cfg, engines.ShimHandler)
		if !n.own(t).HasAPI(t, "1.42") {
			assertInvalidArgument(t, err, "runtime_handler")
		} else if err != nil {
			t.Errorf("shim by name: %v", err)
		} else {
			n.exec(t, n.start(t, id, cfg, sh("sleep 1000")), "true")
			n.removePod(t, id)
		}

		_, err = run(cfg, "io.containerd.missing.v2")
		if err == nil || !strings.Contains(err.Error(), "io.containerd.missing.v2") {
			t.Errorf("missing shim: error %v, want one that names it", err)
		}

		n.assertNoLeftovers(t, cfg)
	})
}
