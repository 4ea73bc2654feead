package conformance

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// createErr returns the error of a CreateContainer call that should fail. A container created
// nevertheless is removed with its pod.
func (n *node) createErr(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, cc *runtimeapi.ContainerConfig,
) error {
	t.Helper()
	_, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId:  pod,
		Config:        cc,
		SandboxConfig: cfg,
	})
	return err
}

// assertInvalidArgument fails the test unless err is InvalidArgument and names the field.
func assertInvalidArgument(t *testing.T, err error, field string) {
	t.Helper()
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), field) {
		t.Errorf("want InvalidArgument naming %s, got %v", field, err)
	}
}

// TestPidTarget creates a debug container like kubectl debug --target (NamespaceMode TARGET).
func TestPidTarget(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		target := n.startNamed(t, pod, cfg, "target", sh("exec sleep 4242"))
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Metadata.Name, cc.LogPath = "debugger", "debugger_0.log"
		cc.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{
			Pid:      runtimeapi.NamespaceMode_TARGET,
			TargetId: target,
		}

		debugger := n.startConfig(t, pod, cfg, cc)
		if got := n.exec(t, debugger, "cat", "/proc/1/cmdline"); got != "sleep\x004242\x00" {
			t.Errorf("process 1 in the debugger: %q", got)
		}

		cc.Metadata.Name = "unknown-target"
		cc.Linux.SecurityContext.NamespaceOptions.TargetId = strings.Repeat("0", 64)
		err := n.createErr(t, pod, cfg, cc)
		if err == nil || n.eng != nil && !strings.Contains(err.Error(), "target_id") {
			t.Errorf("unknown target: %v", err)
		}
	})
}

// TestSharedPidReapsOrphans checks that process 1 of the pod reaps orphans (shareProcessNamespace).
func TestSharedPidReapsOrphans(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		id := n.startConfig(t, pod, cfg, cc)
		n.exec(t, id, "sh", "-c", "(sleep 0.1 & sleep 0.1 & sleep 0.1 &)")
		const ended = "cat /proc/[0-9]*/stat 2>/dev/null | grep '(sleep)' | grep -v ' S ' || true"
		const commands = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"
		eventually(t, "end of the orphans", func() bool {
			return !strings.Contains(n.exec(t, id, "sh", "-c", ended), "sleep") &&
				!strings.Contains(n.exec(t, id, "sh", "-c", commands), "sleep 0.1")
		})
	})
}

// TestIPC checks the IPC namespace and /dev/shm of a pod and of the host.
func TestIPC(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		a := n.startNamed(t, pod, cfg, "a", sh("echo of the pod > /dev/shm/note; sleep 1000"))
		b := n.startNamed(t, pod, cfg, "b", sh("sleep 1000"))

		eventually(t, "shared /dev/shm", func() bool {
			return n.exec(t, b, "sh", "-c", "cat /dev/shm/note 2>/dev/null || true") == "of the pod\n"
		})
		first, second := n.exec(t, a, "readlink", "/proc/self/ns/ipc"), n.exec(t, b, "readlink", "/proc/self/ns/ipc")
		if first != second {
			t.Errorf("containers of one pod have IPC namespaces %s and %s", first, second)
		}

		if got := n.exec(t, a, "sh", "-c", "df -k /dev/shm | tail -1 | awk '{print $2}'"); got != fmt.Sprintln(64<<10) {
			t.Errorf("/dev/shm has %q KiB, want 65536", got)
		}

		host := n.podConfig(t)
		host.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
		hostPod := n.runPod(t, host)
		mode := n.podStatus(t, hostPod).GetLinux().GetNamespaces().GetOptions().GetIpc()
		if mode != runtimeapi.NamespaceMode_NODE {
			t.Errorf("PodSandboxStatus has IPC mode %v, want NODE", mode)
		}

		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
		c := n.startConfig(t, hostPod, host, cc)
		if got, want := n.exec(t, c, "readlink", "/proc/self/ns/ipc"),
			n.run(t, "readlink", "/proc/self/ns/ipc"); got != want {
			t.Errorf("IPC namespace %s, want %s of the node", got, want)
		}
	})
}

// TestHostNetworkWithHostPorts runs a pod like those of kube-proxy and ingress controllers. Its
// host ports need no rules on the host's network.
func TestHostNetworkWithHostPorts(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Hostname = ""
		cfg.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		cfg.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 18081, HostPort: 18081}}
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("hostname > /name; exec httpd -f -p 127.0.0.1:18081 -h /"))
		cc.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		c := n.startConfig(t, pod, cfg, cc)
		if got, want := n.exec(t, c, "hostname"), n.run(t, "hostname"); got != want {
			t.Errorf("host name %q, want %q of the node", got, want)
		}
		if rules := n.run(t, "iptables-save"); strings.Contains(rules, "18081") {
			t.Errorf("iptables rules exist for a port of the host network:\n%s", rules)
		}
	})
}

// TestUnsafeSysctls sets sysctls of the pod's namespaces and is refused those of the node.
func TestUnsafeSysctls(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.Sysctls = map[string]string{"net.core.somaxconn": "1234", "kernel.msgmax": "65000"}
		c := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		got := n.exec(t, c, "cat", "/proc/sys/net/core/somaxconn", "/proc/sys/kernel/msgmax")
		if got != "1234\n65000\n" {
			t.Errorf("sysctls: %q", got)
		}

		for _, bad := range []map[string]string{{"kernel.hostname": "other"}, {"vm.swappiness": "1"}} {
			cfg := n.podConfig(t)
			cfg.Linux.Sysctls = bad
			r, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
			if err == nil {
				t.Errorf("sysctl of the node was accepted: %v", bad)
				n.removePod(t, r.PodSandboxId)
			}

			n.assertNoLeftovers(t, cfg)
		}
	})
}
