package conformance

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/pause"
)

// condition returns a condition of Status.
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

	t.Fatalf("Status has no condition %s", kind)

	return nil
}

func (n *node) netnsCondition(t *testing.T) *runtimeapi.RuntimeCondition {
	t.Helper()
	return n.condition(t, "PodNetworkNamespaces")
}

// inspect returns a field of Docker's inspect response.
func (n *node) inspect(t *testing.T, id, field string) string {
	t.Helper()
	return strings.TrimSpace(n.docker(t, "inspect", "-f", "{{"+field+"}}", id))
}

// assertNetNSMode fails if the creator of a pod's network namespace is not "own" (the daemon) or
// "engine", as wanted.
func (n *node) assertNetNSMode(t *testing.T, id, want string) {
	t.Helper()
	mode := map[string]string{"own": "host", "engine": "none"}[want]
	if got := n.inspect(t, id, ".HostConfig.NetworkMode"); got != mode {
		t.Errorf("Docker's network mode of the pause is %s, want %s", got, mode)
	}
	if got := n.podStatus(t, id).Linux.GetNamespaces().GetOptions().GetNetwork(); got != runtimeapi.NamespaceMode_POD {
		t.Errorf("PodSandboxStatus has network mode %v, want POD", got)
	}
}

// pid returns the process ID of a pod's pause, or of a container's main process.
func (n *node) pid(t *testing.T, id string) string {
	t.Helper()
	if n.eng != nil {
		return n.inspect(t, id, ".State.Pid")
	}

	// containerd and CRI-O have it here.
	var info struct{ PID int }
	var text string
	c, err := n.Runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if text = c.GetInfo()["info"]; err != nil {
		var p *runtimeapi.PodSandboxStatusResponse
		p, err = n.Runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{
			PodSandboxId: id,
			Verbose:      true,
		})
		text = p.GetInfo()["info"]
	}

	if err == nil {
		err = json.Unmarshal([]byte(text), &info)
	}
	if err != nil || info.PID == 0 {
		t.Fatalf("process of %s: %v, %q", id, err, text)
	}

	return strconv.Itoa(info.PID)
}

// procStatus returns a field of /proc/<pid>/status of a container's main process.
func (n *node) procStatus(t *testing.T, id, field string) string {
	t.Helper()
	for line := range strings.Lines(n.run(t, "cat", "/proc/"+n.pid(t, id)+"/status")) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.Join(strings.Fields(rest), " ")
		}
	}

	t.Fatalf("no %s in /proc/<pid>/status", field)

	return ""
}

// assertNoCapabilities checks that the pause has no capabilities.
func (n *node) assertNoCapabilities(t *testing.T, id string) {
	t.Helper()
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if got := n.procStatus(t, id, set); got != "0000000000000000" {
			t.Errorf("%s of the pause: %s, want none", set, got)
		}
	}
}

// TestOwnNetNS checks addresses, files and sysctls of pods in namespaces of the daemon.
func TestOwnNetNS(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		if c := n.netnsCondition(t); !c.Status || c.Reason != "CreatedByDaemon" {
			t.Errorf("condition PodNetworkNamespaces: %v, want reason CreatedByDaemon", c)
		}

		cfg := n.podConfig(t)
		cfg.Hostname = "web-0"
		cfg.Linux.Sysctls = map[string]string{
			"net.ipv4.ip_local_port_range": "20000 30000",
			"kernel.shm_rmid_forced":       "1",
		}

		before := n.run(t, "cat", "/proc/sys/net/ipv4/ip_local_port_range")
		id := n.runPod(t, cfg)
		n.assertNetNSMode(t, id, "own")
		n.assertNoCapabilities(t, id)
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

		sysctls := n.exec(t, c, "cat",
			"/proc/sys/net/ipv4/ip_local_port_range",
			"/proc/sys/kernel/shm_rmid_forced",
			"/proc/sys/net/ipv4/ip_unprivileged_port_start",
		)
		if sysctls != "20000\t30000\n1\n0\n" {
			t.Errorf("sysctls: %q", sysctls)
		}

		if got := n.run(t, "cat", "/proc/sys/net/ipv4/ip_local_port_range"); got != before {
			t.Errorf("sysctl of the node changed to %s", got)
		}

		n.removePod(t, id)
		n.assertNoLeftovers(t, cfg)

		n.assertPauseSecurity(t)
	})
}

// assertPauseSecurity checks that an unknown sysctl is refused, and that pauses with a user and of
// privileged pods have no capabilities in namespaces of the daemon.
func (n *node) assertPauseSecurity(t *testing.T) {
	t.Helper()
	bad := n.podConfig(t)
	bad.Linux.Sysctls = map[string]string{"net.no.such": "1"}
	if _, err := n.Runtime.RunPodSandbox(t.Context(),
		&runtimeapi.RunPodSandboxRequest{Config: bad}); status.Code(err) != codes.InvalidArgument ||
		!strings.Contains(err.Error(), "net.no.such") {
		t.Errorf("unknown sysctl: %v, want InvalidArgument", err)
	}

	n.assertNoLeftovers(t, bad)

	user := n.podConfig(t)
	sc := user.Linux.SecurityContext
	sc.RunAsUser, sc.RunAsGroup = &runtimeapi.Int64Value{Value: 1000}, &runtimeapi.Int64Value{Value: 2000}
	sc.SupplementalGroups = []int64{3000, 4000}
	sc.ReadonlyRootfs = true
	id := n.runPod(t, user)
	n.assertNetNSMode(t, id, "own")
	n.assertNoCapabilities(t, id)
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
	n.assertNetNSMode(t, id, "own")
	n.assertNoCapabilities(t, id)
	n.exec(t, n.start(t, id, privileged, sh("sleep 1000")), "true")
}

// TestNetNSModes creates pods in both modes of --pod-netns and passes them to a daemon of the other
// mode. After a kill of the pause with docker, its address and host port are still released.
func TestNetNSModes(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		other := map[string]string{"own": "engine", "engine": "own"}
		port := int32(18100)
		for mode := range maps.Keys(other) {
			t.Run(mode, func(t *testing.T) {
				n.Change(t, "--pod-netns="+mode)
				n.AwaitReady(t)
				if c := n.netnsCondition(t); c.Status != (mode == "own") ||
					mode == "engine" && c.Message != "--pod-netns=engine" {
					t.Errorf("condition PodNetworkNamespaces: %v", c)
				}

				port++
				cfg := n.podConfig(t)
				cfg.PortMappings = []*runtimeapi.PortMapping{{
					Protocol:      runtimeapi.Protocol_TCP,
					ContainerPort: 80,
					HostPort:      port,
				}}

				id := n.runPod(t, cfg)
				n.assertNetNSMode(t, id, mode)
				ip := n.podStatus(t, id).Network.GetIp()
				n.Change(t, "--pod-netns="+other[mode])
				n.AwaitReady(t)
				if got := n.podStatus(t, id); got.Network.GetIp() != ip ||
					got.State != runtimeapi.PodSandboxState_SANDBOX_READY {
					t.Errorf("pod after the change of the mode: %v", got)
				}

				n.assertNetNSMode(t, id, mode)
				c := n.start(t, id, cfg, sh("sleep 1000"))
				if got := n.exec(t, c, "ip", "-o", "addr"); !strings.Contains(got, ip+"/") {
					t.Errorf("addresses in a container created after the change of the mode: %s", got)
				}

				n.docker(t, "kill", id)
				eventually(t, "NotReady pod", func() bool {
					return n.podStatus(t, id).State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
				})
				n.stopPod(t, id)
				if rules := n.run(t, "iptables-save"); strings.Contains(rules, fmt.Sprint(port)) {
					t.Errorf("rules of the host port remain:\n%s", rules)
				}
				if leases, _ := filepath.Glob(filepath.Join(n.LeaseDir, "kubenet", ip)); len(leases) > 0 {
					t.Errorf("the address is still reserved: %v", leases)
				}

				n.removePod(t, id)
				n.assertNoLeftovers(t, cfg)
			})
		}
	})
}

// loadPause loads an image with the given name that runs sleep instead of the pause program, so
// that it cannot join a namespace.
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

// TestReplacedPauseImage gives the name of the embedded pause image to another image. Pods still
// run the embedded one, before and after a restart of the daemon. With the operator's sandbox
// image, the daemon does not create namespaces.
func TestReplacedPauseImage(t *testing.T) {
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
		n.assertNetNSMode(t, id, "own")
		n.removePod(t, id)
		n.Change(t)
		n.AwaitReady(t)
		id = n.runPod(t, cfg)
		n.assertNetNSMode(t, id, "own")
		n.removePod(t, good)
		n.removePod(t, id)
		n.assertNoLeftovers(t, first)
		n.assertNoLeftovers(t, cfg)

		n.loadPause(t, "sandbox.example/pause:1")
		n.Change(t, "--pod-infra-container-image=sandbox.example/pause:1")
		n.AwaitReady(t)
		n.assertNetNSMode(t, n.runPod(t, n.podConfig(t)), "engine")
		if c := n.netnsCondition(t); c.Status || !strings.Contains(c.Message, "--pod-infra-container-image") {
			t.Errorf("condition PodNetworkNamespaces: %v", c)
		}
	})
}

// TestUsernsRemap runs an engine with its containers in a user namespace. The engine must create
// their network namespaces.
func TestUsernsRemap(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t)
		if c := n.netnsCondition(t); c.Status || !strings.Contains(c.Message, "userns-remap") {
			t.Errorf("condition PodNetworkNamespaces: %v", c)
		}

		cfg := n.podConfig(t)
		id := n.runPod(t, cfg)
		n.assertNetNSMode(t, id, "engine")
		c := n.start(t, id, cfg, sh("sleep 1000"))
		ip, addresses := n.podStatus(t, id).Network.GetIp(), n.exec(t, c, "ip", "-o", "addr")
		if ip == "" || !strings.Contains(addresses, ip+"/") {
			t.Errorf("address %q, addresses in the pod: %s", ip, addresses)
		}

		n.removePod(t, id)
		n.assertNoLeftovers(t, cfg)
	}, "--userns-remap=nobody:nogroup")
}
