package conformance

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/pause"
)

// condition is one of the daemon's conditions.
func (n *node) condition(t *testing.T, kind string) *runtimeapi.RuntimeCondition {
	t.Helper()
	s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range s.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}

	t.Fatalf("no %s condition", kind)

	return nil
}

func (n *node) netnsCondition(t *testing.T) *runtimeapi.RuntimeCondition {
	t.Helper()
	return n.condition(t, "PodNetworkNamespaces")
}

// inspect is a field of Docker's answer to an inspect.
func (n *node) inspect(t *testing.T, id, field string) string {
	t.Helper()
	return strings.TrimSpace(n.docker(t, "inspect", "-f", "{{"+field+"}}", id))
}

// madeBy fails if a pod's network namespace is not of this kind: "own" or "engine".
func (n *node) madeBy(t *testing.T, id, want string) {
	t.Helper()
	mode := map[string]string{"own": "host", "engine": "none"}[want]
	if got := n.inspect(t, id, ".HostConfig.NetworkMode"); got != mode {
		t.Errorf("Docker's network mode of the pause is %s, want %s", got, mode)
	}
	if got := n.podStatus(t, id).Linux.GetNamespaces().GetOptions().GetNetwork(); got != runtimeapi.NamespaceMode_POD {
		t.Errorf("PodSandboxStatus says network %v", got)
	}
}

// procStatus is a line of the pause's /proc/<pid>/status.
func (n *node) procStatus(t *testing.T, id, field string) string {
	t.Helper()
	for line := range strings.Lines(n.run(t, "cat", "/proc/"+n.inspect(t, id, ".State.Pid")+"/status")) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.Join(strings.Fields(rest), " ")
		}
	}

	t.Fatalf("no %s in the pause's status", field)

	return ""
}

func (n *node) noCapabilities(t *testing.T, id string) {
	t.Helper()
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if got := n.procStatus(t, id, set); got != "0000000000000000" {
			t.Errorf("the pause's %s is %s", set, got)
		}
	}
}

func TestOwnNetNS(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		if c := n.netnsCondition(t); !c.Status || c.Reason != "Own" {
			t.Errorf("condition: %v", c)
		}

		cfg := n.podConfig(t)
		cfg.Hostname = "web-0"
		cfg.Linux.Sysctls = map[string]string{
			"net.ipv4.ip_local_port_range": "20000 30000",
			"kernel.shm_rmid_forced":       "1",
		}

		before := n.run(t, "cat", "/proc/sys/net/ipv4/ip_local_port_range")
		id := n.runPod(t, cfg)
		n.madeBy(t, id, "own")
		n.noCapabilities(t, id)
		c := n.start(t, id, cfg, sh("sleep 1000"))
		ip := n.podStatus(t, id).Network.GetIp()
		if got := n.exec(t, c, "ip", "-o", "addr"); !strings.Contains(got, ip+"/") ||
			!strings.Contains(got, "127.0.0.1/8") {
			t.Errorf("addresses in the pod: %s", got)
		}

		if got := n.exec(t, c, "cat", "/etc/hosts"); !strings.Contains(got, "127.0.0.1\tlocalhost\n") ||
			!strings.Contains(got, ip+"\tweb-0\n") {
			t.Errorf("hosts file:\n%s", got)
		}

		if got := n.exec(t, c, "cat", "/proc/sys/net/ipv4/ip_local_port_range", "/proc/sys/kernel/shm_rmid_forced",
			"/proc/sys/net/ipv4/ip_unprivileged_port_start"); got != "20000\t30000\n1\n0\n" {
			t.Errorf("sysctls: %q", got)
		}

		if got := n.run(t, "cat", "/proc/sys/net/ipv4/ip_local_port_range"); got != before {
			t.Errorf("the node's sysctl became %s", got)
		}

		n.removePod(t, id)
		n.assertNothingLeft(t, cfg)

		bad := n.podConfig(t)
		bad.Linux.Sysctls = map[string]string{"net.no.such": "1"}
		if _, err := n.Runtime.RunPodSandbox(t.Context(),
			&runtimeapi.RunPodSandboxRequest{Config: bad}); status.Code(err) != codes.InvalidArgument ||
			!strings.Contains(err.Error(), "net.no.such") {
			t.Errorf("a sysctl that is none: %v", err)
		}

		n.assertNothingLeft(t, bad)

		user := n.podConfig(t)
		sc := user.Linux.SecurityContext
		sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups, sc.ReadonlyRootfs = &runtimeapi.Int64Value{Value: 1000},
			&runtimeapi.Int64Value{Value: 2000}, []int64{3000, 4000}, true
		id = n.runPod(t, user)
		n.madeBy(t, id, "own")
		n.noCapabilities(t, id)
		for field, want := range map[string]string{
			"Uid":    "1000 1000 1000 1000",
			"Gid":    "2000 2000 2000 2000",
			"Groups": "3000 4000",
		} {
			if got := n.procStatus(t, id, field); got != want {
				t.Errorf("%s of the pause: %s, want %s", field, got, want)
			}
		}

		privileged := n.podConfig(t)
		privileged.Linux.SecurityContext.Privileged = true
		id = n.runPod(t, privileged)
		n.madeBy(t, id, "own")
		n.noCapabilities(t, id)
		n.exec(t, n.start(t, id, privileged, sh("sleep 1000")), "true")
	})
}

// TestNetNSModes makes pods with namespaces of either kind, and hands them from a daemon of one
// mode to one of the other. The pause of each is killed behind our back: its address and host port
// are released all the same.
func TestNetNSModes(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		other := map[string]string{"own": "engine", "engine": "own"}
		port := int32(18100)
		for mode := range maps.Keys(other) {
			n.Change(t, "--pod-netns="+mode)
			n.AwaitReady(t)
			if c := n.netnsCondition(t); c.Status != (mode == "own") || mode == "engine" &&
				c.Message != "--pod-netns=engine" {
				t.Errorf("condition: %v", c)
			}

			port++
			cfg := n.podConfig(t)
			cfg.PortMappings = []*runtimeapi.PortMapping{{
				Protocol:      runtimeapi.Protocol_TCP,
				ContainerPort: 80,
				HostPort:      port,
			}}

			id := n.runPod(t, cfg)
			n.madeBy(t, id, mode)
			ip := n.podStatus(t, id).Network.GetIp()
			n.Change(t, "--pod-netns="+other[mode])
			n.AwaitReady(t)
			if got := n.podStatus(t, id); got.Network.GetIp() != ip ||
				got.State != runtimeapi.PodSandboxState_SANDBOX_READY {
				t.Errorf("a pod of mode %s under a daemon of the other: %v", mode, got)
			}

			n.madeBy(t, id, mode)
			c := n.start(t, id, cfg, sh("sleep 1000"))
			if got := n.exec(t, c, "ip", "-o", "addr"); !strings.Contains(got, ip+"/") {
				t.Errorf("a container made under the other mode: %s", got)
			}

			n.docker(t, "kill", id)
			eventually(t, "pod NotReady", func() bool {
				return n.podStatus(t, id).State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
			})
			n.stopPod(t, id)
			if rules := n.run(t, "iptables-save"); strings.Contains(rules, fmt.Sprint(port)) {
				t.Errorf("rules of the host port are left:\n%s", rules)
			}
			if leases, _ := filepath.Glob(filepath.Join(n.LeaseDir, "kubenet", ip)); len(leases) > 0 {
				t.Errorf("the address is still reserved: %v", leases)
			}

			n.removePod(t, id)
			n.assertNothingLeft(t, cfg)
		}
	})
}

// loadPause loads an image under a name that runs a shell's sleep in place of the pause program,
// which joins nothing.
func (n *node) loadPause(t *testing.T, ref string) {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}

	archive, err := pause.Archive(ref, runtime.GOARCH, map[string][]byte{"sleep": busybox},
		[]string{"/sleep", "100000"}, nil)
	if err != nil {
		t.Fatal(err)
	}

	cmd := n.own(t).Command("docker", "-H", "unix://"+n.own(t).Socket, "load")
	cmd.Stdin = bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("docker load: %v\n%s", err, out)
	}
}

// TestPauseOfOtherContent gives the name of the embedded pause to another program. Pods run the
// embedded one all the same, before and after a restart of the daemon. With a sandbox image of the
// operator's it does not even try to join a namespace.
func TestPauseOfOtherContent(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		first := n.podConfig(t)
		good := n.runPod(t, first)
		img, err := pause.New(runtime.GOARCH)
		if err != nil {
			t.Fatal(err)
		}

		n.loadPause(t, img.Ref)

		cfg := n.podConfig(t)
		id := n.runPod(t, cfg)
		n.madeBy(t, id, "own")
		n.removePod(t, id)
		n.Change(t)
		n.AwaitReady(t)
		id = n.runPod(t, cfg)
		n.madeBy(t, id, "own")
		n.removePod(t, good)
		n.removePod(t, id)
		n.assertNothingLeft(t, first)
		n.assertNothingLeft(t, cfg)

		n.loadPause(t, "sandbox.example/pause:1")
		n.Change(t, "--pod-infra-container-image=sandbox.example/pause:1")
		n.AwaitReady(t)
		n.madeBy(t, n.runPod(t, n.podConfig(t)), "engine")
		if c := n.netnsCondition(t); c.Status || !strings.Contains(c.Message, "--pod-infra-container-image") {
			t.Errorf("condition: %v", c)
		}
	})
}

// TestUsernsRemap is an engine whose containers live in a user namespace: it must make their
// network namespaces itself.
func TestUsernsRemap(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t)
		if c := n.netnsCondition(t); c.Status || !strings.Contains(c.Message, "userns-remap") {
			t.Errorf("condition: %v", c)
		}

		cfg := n.podConfig(t)
		id := n.runPod(t, cfg)
		n.madeBy(t, id, "engine")
		c := n.start(t, id, cfg, sh("sleep 1000"))
		if ip := n.podStatus(t, id).Network.GetIp(); ip == "" || !strings.Contains(n.exec(t, c, "ip", "-o", "addr"),
			ip+"/") {
			t.Errorf("address %q", ip)
		}

		n.removePod(t, id)
		n.assertNothingLeft(t, cfg)
	}, "--userns-remap=nobody:nogroup")
}
