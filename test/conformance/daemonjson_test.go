package conformance

import (
	"context"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/registry"
)

// Settings in the engine's daemon.json with an effect on containers.

// TestEngineInit configures an engine to give every container an init process. A sandbox gets none,
// so that its pause can join the pod's network namespace immediately. A container keeps the
// operator's setting.
func TestEngineInit(t *testing.T) {
	const init = "docker-init"
	program, err := exec.LookPath(init)
	if err != nil {
		t.Fatalf("%v; install Debian's package docker.io", err)
	}

	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t)
		for range 2 {
			cfg := n.podConfig(t)
			id := n.runPod(t, cfg)
			n.assertNetNSMode(t, id, "own")
			c := n.start(t, id, cfg, sh("sleep 1000"))
			if name := n.exec(t, c, "cat", "/proc/1/comm"); strings.TrimSpace(name) != init {
				t.Errorf("process 1 of the container is %q", name)
			}

			shared := n.containerConfig(sh("sleep 1000"))
			shared.Metadata.Name = "shared"
			shared.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD},
			}}
			s := n.startConfig(t, id, cfg, shared)
			if name := n.exec(t, s, "cat", "/proc/1/comm"); strings.TrimSpace(name) != "pause" {
				t.Errorf("process 1 of the sandbox is %q", name)
			}

			n.removePod(t, id)
			n.assertNoLeftovers(t, cfg)
		}

		if c := n.netnsCondition(t); !c.Status {
			t.Errorf("condition PodNetworkNamespaces: %v, want true", c)
		}
	}, "--init", "--init-path="+program)
}

// TestUsernsRemapHostPods enables userns-remap. Privileged pods and pods with a namespace of the
// node run in the node's user namespace with all their containers. All other pods are mapped.
func TestUsernsRemapHostPods(t *testing.T) {
	const hostNS, podNS = runtimeapi.NamespaceMode_NODE, runtimeapi.NamespaceMode_POD
	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t)
		for name, c := range map[string]struct {
			ns         *runtimeapi.NamespaceOption
			privileged bool
			mapped     bool
		}{
			"plain":        {mapped: true},
			"shared PIDs":  {ns: &runtimeapi.NamespaceOption{Pid: podNS}, mapped: true},
			"host network": {ns: &runtimeapi.NamespaceOption{Network: hostNS}},
			"host PIDs":    {ns: &runtimeapi.NamespaceOption{Pid: hostNS}},
			"host IPC":     {ns: &runtimeapi.NamespaceOption{Ipc: hostNS}},
			"privileged":   {privileged: true},
			"all of them": {
				ns:         &runtimeapi.NamespaceOption{Network: hostNS, Pid: hostNS, Ipc: hostNS},
				privileged: true,
			},
		} {
			t.Run(name, func(t *testing.T) {
				cfg := n.podConfig(t)
				cfg.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{
					NamespaceOptions: c.ns,
					Privileged:       c.privileged,
				}

				id := n.runPod(t, cfg)
				cc := n.containerConfig(sh("cat /proc/self/uid_map; sleep 1000"))
				cc.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
					NamespaceOptions: c.ns,
					Privileged:       c.privileged,
				}}

				first := n.startConfig(t, id, cfg, cc)
				if mapped := n.hasMappedUsers(t, first); mapped != c.mapped {
					t.Errorf("users are mapped: %t, want %t", mapped, c.mapped)
				}
				if c.privileged {
					n.exec(t, first, "sh", "-c", "mkdir -p /mnt && mount -t tmpfs none /mnt")
				}

				other := n.containerConfig(sh("sleep 1000")) // a sidecar of a privileged pod need not be privileged
				other.Metadata.Name = "other"
				other.Linux = &runtimeapi.LinuxContainerConfig{
					SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: c.ns},
				}
				if o := n.startConfig(t, id, cfg, other); n.hasMappedUsers(t, o) != c.mapped {
					t.Error("the second container has another user mapping")
				}

				n.removePod(t, id)
				n.assertNoLeftovers(t, cfg)
			})
		}

		n.assertPrivilegeRefused(t)
	}, "--userns-remap=nobody:nogroup")
}

// hasMappedUsers reports whether root of a container is an unprivileged user of the node.
func (n *node) hasMappedUsers(t *testing.T, id string) bool {
	t.Helper()
	return strings.Fields(n.exec(t, id, "cat", "/proc/self/uid_map"))[1] != "0"
}

// assertPrivilegeRefused requests containers that conflict with the pod's user namespace.
func (n *node) assertPrivilegeRefused(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	id := n.runPod(t, cfg)
	for field, sc := range map[string]*runtimeapi.LinuxContainerSecurityContext{
		"privileged":            {Privileged: true},
		"namespace_options.pid": {NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE}},
	} {
		t.Run(field, func(t *testing.T) {
			cc := n.containerConfig(sh("sleep 1000"))
			cc.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: sc}
			err := n.createErr(t, id, cfg, cc)
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), field) ||
				!strings.Contains(err.Error(), "userns-remap") {
				t.Errorf("CreateContainer: %v, want InvalidArgument for the field", err)
			}
		})
	}

	n.removePod(t, id)
}

// TestQueuedPull queues a pull behind another in the engine. Waiting in the download queue counts
// as progress, regardless of the client of the first pull. A pull from a registry without a
// response does not.
func TestQueuedPull(t *testing.T) {
	const deadline = 4 * time.Second
	eachEngine(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		n = n.withDaemon(t, "--image-pull-progress-deadline="+deadline.String())
		for _, puller := range []string{"daemon", "docker"} {
			t.Run(puller, func(t *testing.T) {
				big := r.Add(t, "big-"+puller, "1", 1, 12<<20)
				small := r.Add(t, "small-"+puller, "1", 1, 10000)
				r.Set("big-"+puller, registry.Rule{Rate: 1 << 20})
				var wg sync.WaitGroup
				wg.Go(func() {
					if puller == "docker" {
						n.docker(t, "pull", big)
					} else if _, err := n.pull(t.Context(), big, nil); err != nil {
						t.Errorf("first pull: %v", err)
					}
				})

				eventually(t, "start of the first pull", func() bool { return r.Busy("big-"+puller) > 0 })
				begin := time.Now()
				_, err := n.pull(t.Context(), small, nil)
				if took := time.Since(begin); err != nil || took < deadline {
					t.Errorf("second pull: %v after %s, want success after the deadline", err, took)
				}

				wg.Wait()
			})
		}

		stuck := r.Add(t, "stuck", "1", 1, 10000)
		r.Set("stuck", registry.Rule{BeforeBlob: make(chan struct{})})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()

		if _, err := n.pull(ctx, stuck, nil); status.Code(err) != codes.Unavailable {
			t.Errorf("pull from a registry that does not respond: %v, want Unavailable", err)
		}
	}, "--max-concurrent-downloads=1")
}
