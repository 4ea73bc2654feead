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

// Settings of the engine's daemon.json that change what containers are.

// TestEngineInit is an engine that gives every container an init process. A sandbox has none, so
// that its pause joins the pod's network namespace at once; a container keeps what the operator
// wants.
func TestEngineInit(t *testing.T) {
	const init = "docker-init"
	program, err := exec.LookPath(init)
	if err != nil {
		t.Fatalf("%v; Debian's package docker.io has it", err)
	}

	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t)
		for range 2 {
			cfg := n.podConfig(t)
			id := n.runPod(t, cfg)
			n.madeBy(t, id, "own")
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
			n.assertNothingLeft(t, cfg)
		}

		if c := n.netnsCondition(t); !c.Status {
			t.Errorf("condition: %v", c)
		}
	}, "--init", "--init-path="+program)
}

// TestUsernsRemapHostPods: with userns-remap, pods that share a namespace of the node, or are
// privileged, run in the node's user namespace with all their containers; all others are mapped.
func TestUsernsRemapHostPods(t *testing.T) {
	const hostNS, podNS = runtimeapi.NamespaceMode_NODE, runtimeapi.NamespaceMode_POD
	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t)
		for name, test := range map[string]struct {
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
			"all of it": {ns: &runtimeapi.NamespaceOption{
				Network: hostNS,
				Pid:     hostNS,
				Ipc:     hostNS,
			}, privileged: true},
		} {
			cfg := n.podConfig(t)
			cfg.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: test.ns,
				Privileged:       test.privileged,
			}

			id := n.runPod(t, cfg)
			cc := n.containerConfig(sh("cat /proc/self/uid_map; sleep 1000"))
			cc.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: test.ns,
				Privileged:       test.privileged,
			}}

			c := n.startConfig(t, id, cfg, cc)
			if mapped := n.mapsUsers(t, c); mapped != test.mapped {
				t.Errorf("%s: users are mapped: %v", name, mapped)
			}
			if test.privileged {
				n.exec(t, c, "sh", "-c", "mkdir -p /mnt && mount -t tmpfs none /mnt")
			}

			other := n.containerConfig(sh("sleep 1000")) // a sidecar of a privileged pod need not be privileged
			other.Metadata.Name = "other"
			other.Linux = &runtimeapi.LinuxContainerConfig{
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: test.ns},
			}
			if o := n.startConfig(t, id, cfg, other); n.mapsUsers(t, o) != test.mapped {
				t.Errorf("%s: the second container is mapped otherwise", name)
			}

			n.removePod(t, id)
			n.assertNothingLeft(t, cfg)
		}

		n.refusesPrivilege(t)
	}, "--userns-remap=nobody:nogroup")
}

// mapsUsers says whether root of a container is another user of the node.
func (n *node) mapsUsers(t *testing.T, id string) bool {
	t.Helper()
	return strings.Fields(n.exec(t, id, "cat", "/proc/self/uid_map"))[1] != "0"
}

// refusesPrivilege asks for containers that cannot run in their pod's user namespace.
func (n *node) refusesPrivilege(t *testing.T) {
	t.Helper()
	cfg := n.podConfig(t)
	id := n.runPod(t, cfg)
	for field, sc := range map[string]*runtimeapi.LinuxContainerSecurityContext{
		"privileged":            {Privileged: true},
		"namespace_options.pid": {NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE}},
	} {
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: sc}
		err := n.createErr(t, id, cfg, cc)
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), field) ||
			!strings.Contains(err.Error(), "userns-remap") {
			t.Errorf("%s: %v", field, err)
		}
	}

	n.removePod(t, id)
}

// TestPullWaitsForItsTurn: a pull in the engine's download queue is not without progress, whoever
// pulls what is before it; one whose registry does not answer is.
func TestPullWaitsForItsTurn(t *testing.T) {
	const deadline = 4 * time.Second
	eachEngine(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		n = n.withDaemon(t, "--image-pull-progress-deadline="+deadline.String())
		for _, who := range []string{"daemon", "docker"} {
			big, small := r.Add(t, "big-"+who, "1", 1, 12<<20), r.Add(t, "small-"+who, "1", 1, 10000)
			r.Set("big-"+who, registry.Rule{Rate: 1 << 20})
			var wg sync.WaitGroup
			wg.Go(func() {
				if who == "docker" {
					n.docker(t, "pull", big)
				} else if _, err := n.pull(t.Context(), big, nil); err != nil {
					t.Errorf("the first pull: %v", err)
				}
			})

			eventually(t, "the first pull is under way", func() bool { return r.Busy("big-"+who) > 0 })
			begin := time.Now()
			_, err := n.pull(t.Context(), small, nil)
			if took := time.Since(begin); err != nil || took < deadline {
				t.Errorf("behind a pull by %s: %v after %s; it was to wait", who, err, took)
			}

			wg.Wait()
		}

		sick := r.Add(t, "sick", "1", 1, 10000)
		r.Set("sick", registry.Rule{BeforeBlob: make(chan struct{})})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()

		if _, err := n.pull(ctx, sick, nil); status.Code(err) != codes.Unavailable {
			t.Errorf("a registry that does not answer: %v", err)
		}
	}, "--max-concurrent-downloads=1")
}
