package conformance

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// agentScript is the last plugin of a chain, like the plugins of service meshes and of add-ons with
// an agent. It appends its commands to "calls" and saves its input in "stdin". Its DEL runs while
// the file "slow" exists, for at most two minutes.
const agentScript = `#!/bin/sh
cd DIR
cat > stdin.$CNI_COMMAND
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS" >> calls
case $CNI_COMMAND in
ADD) sed 's/.*"prevResult":\({.*}\),"runtimeConfig".*/\1/; s/.*"prevResult":\({.*}\),"type".*/\1/' stdin.ADD;;
DEL) i=0; while [ -e slow ] && [ $i -lt 1200 ]; do sleep 0.1; i=$((i+1)); done; echo ended >> calls;;
esac
`

// addOn is a node with the plugin "agent" chained after the bridge.
type addOn struct {
	*cniNode
}

// addOnConfig is the network configuration of an addOn.
const addOnConfig = `{"cniVersion":"1.0.0","name":"pods","plugins":[
	{"type":"bridge","bridge":"add0","isGateway":true,"ipMasq":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.93.0.0/24"}]]}},
	{"type":"portmap","capabilities":{"portMappings":true},"snat":true},
	{"type":"agent","capabilities":{"io.kubernetes.cri.pod-annotations":true,"cgroupPath":true}}]}`

func newAddOn(t *testing.T, n *node) *addOn {
	t.Helper()
	a := &addOn{newCNINode(t, n)}
	script := strings.ReplaceAll(agentScript, "DIR", a.bin)
	engines.WriteProgram(t, filepath.Join(a.bin, "agent"), script)
	a.configure(t, addOnConfig)
	return a
}

// read returns a file of the plugin, or "" if it does not exist.
func (a *addOn) read(name string) string {
	b, _ := os.ReadFile(filepath.Join(a.bin, name))
	return string(b)
}

func (a *addOn) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(a.bin, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (a *addOn) remove(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(a.bin, name)); err != nil {
		t.Fatal(err)
	}
}

// addOnPod returns the configuration of a pod with a host port.
func (a *addOn) addOnPod(t *testing.T) *runtimeapi.PodSandboxConfig {
	t.Helper()
	cfg := a.podConfig(t)
	cfg.PortMappings = []*runtimeapi.PortMapping{{
		Protocol:      runtimeapi.Protocol_TCP,
		ContainerPort: 80,
		HostPort:      18193,
	}}

	return cfg
}

// assertReleased waits for the release of a pod's address and fails if other network state of the
// pod remains.
func (a *addOn) assertReleased(t *testing.T, cfg *runtimeapi.PodSandboxConfig) {
	t.Helper()
	leases := filepath.Join(a.LeaseDir, "pods/10.93.*")
	eventually(t, "release of the pod's address", func() bool {
		remaining, _ := filepath.Glob(leases)
		return len(remaining) == 0
	})
	a.assertNoLeftovers(t, cfg)
	if rules := a.run(t, "iptables-save"); strings.Contains(rules, "18193") || strings.Contains(rules, "10.93.0.") {
		t.Errorf("iptables rules of the pod remain:\n%s", rules)
	}
}

// TestAddOns covers network add-ons with an agent in a pod, and add-ons that are installed and
// uninstalled while pods run.
func TestAddOns(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		a := newAddOn(t, n)
		for _, mode := range []string{"own", "engine"} {
			t.Run("agent in a pod, "+mode, func(t *testing.T) {
				a.change(t, mode)
				agentInAPod(t, a, mode)
			})
		}

		t.Run("uninstalled plugin", func(t *testing.T) { uninstalledPlugin(t, a) })
		t.Run("missing plugin", func(t *testing.T) { missingPlugin(t, a) })
		t.Run("slow DEL", func(t *testing.T) { slowDel(t, a) })
		t.Run("crash in a slow DEL", func(t *testing.T) { crashInSlowDel(t, a) })
		t.Run("pins of an earlier version", func(t *testing.T) { earlierPins(t, a) })
		t.Run("files", func(t *testing.T) { networkFiles(t, a) })
	})
}

// change restarts the daemon with a mode of --pod-netns.
func (a *addOn) change(t *testing.T, mode string) {
	t.Helper()
	a.Change(t,
		"--network-plugin=cni",
		"--cni-conf-dir="+a.conf,
		"--cni-bin-dir="+a.bin,
		"--pod-cidr=",
		"--pod-netns="+mode,
	)
	a.AwaitReady(t)
}

// agentInAPod runs an agent in a pod. The agent mounts /var/run/netns before other pods exist and
// sees their network namespaces only through that mount.
func agentInAPod(t *testing.T, a *addOn, mode string) {
	host := a.podConfig(t)
	host.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{
		Network: runtimeapi.NamespaceMode_NODE,
		Pid:     runtimeapi.NamespaceMode_NODE,
	}

	host.Linux.SecurityContext.Privileged = true
	cc := a.containerConfig(sh("sleep 1000"))
	cc.Linux.SecurityContext.Privileged = true
	cc.Linux.SecurityContext.NamespaceOptions = host.Linux.SecurityContext.NamespaceOptions
	cc.Mounts = []*runtimeapi.Mount{{
		HostPath:      "/var/run/netns",
		ContainerPath: "/var/run/netns",
		Propagation:   runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
	}}

	agentPod := a.runPod(t, host)
	agent := a.startConfig(t, agentPod, host, cc)

	cfg := a.addOnPod(t)
	cfg.Annotations = map[string]string{"example.com/zone": "a"}
	id := a.runPod(t, cfg)
	a.assertNetNSMode(t, id, mode)
	calls := strings.Fields(a.read("calls"))
	path := calls[len(calls)-1]
	if !strings.HasPrefix(path, "/var/run/netns/cni-") {
		t.Errorf("CNI_NETNS %q, want a file in /var/run/netns", path)
	}

	inode := func(file string) string { return strings.TrimSpace(a.exec(t, agent, "stat", "-L", "-c", "%i", file)) }
	if got, want := inode(path), inode("/proc/"+a.inspect(t, id, ".State.Pid")+"/ns/net"); got != want {
		t.Errorf("the agent sees network namespace %s, want %s of the pod", got, want)
	}

	for _, want := range []string{`"example.com/zone":"a"`, `"cgroupPath":"` + cfg.Linux.CgroupParent + `"`} {
		if in := a.read("stdin.ADD"); !strings.Contains(in, want) {
			t.Errorf("input of the plugin lacks %s:\n%s", want, in)
		}
	}

	a.removePod(t, id)
	a.assertReleased(t, cfg)
	if out := a.exec(t, agent, "ls", "/var/run/netns"); strings.Contains(out, filepath.Base(path)) {
		t.Errorf("the agent still sees the namespace of the removed pod: %s", out)
	}

	a.removePod(t, agentPod)
}

// uninstalledPlugin removes the last plugin of a chain while a pod runs.
func uninstalledPlugin(t *testing.T, a *addOn) {
	cfg := a.addOnPod(t)
	id := a.runPod(t, cfg)
	plugin := a.read("agent")
	a.remove(t, "agent")
	a.removePod(t, id)
	a.assertReleased(t, cfg)
	log := a.run(t, "cat", a.Log())
	if n := strings.Count(log, "plugins=agent "); n != 1 ||
		!strings.Contains(log, "CNI plugins were uninstalled while a pod was running") {
		t.Errorf("the daemon logged the uninstalled plugin %d times, want once", n)
	}

	engines.WriteProgram(t, filepath.Join(a.bin, "agent"), plugin)
	eventually(t, "DEL of the reinstalled plugin", func() bool { return strings.Contains(a.read("calls"), "DEL "+id) })
}

// missingPlugin configures a chain with a missing plugin. The pod fails, the error names the
// plugin, and no state remains.
func missingPlugin(t *testing.T, a *addOn) {
	plugin := a.read("agent")
	a.remove(t, "agent")
	cfg := a.addOnPod(t)
	_, err := a.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err == nil || !strings.Contains(err.Error(), `CNI plugin "agent" is not in `) {
		t.Errorf("RunPodSandbox: %v, want an error that names the plugin", err)
	}

	a.assertReleased(t, cfg)
	engines.WriteProgram(t, filepath.Join(a.bin, "agent"), plugin)
}

// slowDel has an add-on with a DEL longer than the deadlines of its callers, as with kubeadm reset.
func slowDel(t *testing.T, a *addOn) {
	cfg := a.addOnPod(t)
	id := a.runPod(t, cfg)
	a.start(t, id, cfg, sh("sleep 1000"))
	a.write(t, "calls", "")
	a.write(t, "slow", "")
	var err error
	for range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		if _, err = a.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err == nil {
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), 3*time.Second)
			_, err = a.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
		}

		cancel()
		if err == nil {
			break
		}
	}

	if err != nil {
		t.Errorf("remove the pod: %v", err)
	}

	if ps := a.docker(t, "ps", "-aq", "--filter", "name="+cfg.Metadata.Uid); ps != "" {
		t.Errorf("containers remain: %s", ps)
	}

	a.remove(t, "slow")
	eventually(t, "end of the DEL", func() bool { return strings.Contains(a.read("calls"), "ended") })
	a.assertReleased(t, cfg)
	if n := strings.Count(a.read("calls"), "DEL "); n != 1 {
		t.Errorf("%d DELs, want 1:\n%s", n, a.read("calls"))
	}
}

// crashInSlowDel kills or stops the daemon during a DEL. A stop takes effect immediately. The next
// DEL waits for the plugin process of the first and releases the remaining state.
func crashInSlowDel(t *testing.T, a *addOn) {
	for name, end := range map[string]func(){
		"killed":  func() { a.Kill(t) },
		"stopped": func() { a.Stop(t) },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := a.addOnPod(t)
			id := a.runPod(t, cfg)
			a.write(t, "calls", "")
			a.write(t, "slow", "")
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if _, err := a.Runtime.StopPodSandbox(ctx,
				&runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err == nil {
				t.Error("StopPodSandbox succeeded during the DEL")
			}

			cancel()
			end()
			a.Restart(t)
			a.remove(t, "slow")
			a.removePod(t, id)
			a.assertReleased(t, cfg)
			calls := a.read("calls")
			if first := strings.Index(calls, "ended"); first < 0 || first > strings.LastIndex(calls, "DEL ") {
				t.Errorf("the next DEL did not wait:\n%s", calls)
			}
		})
	}
}

// earlierPins upgrades from a version with pins of namespaces in its run directory. The pod keeps
// running, its pin moves, and its network is released later.
func earlierPins(t *testing.T, a *addOn) {
	cfg := a.addOnPod(t)
	id := a.runPod(t, cfg)
	c := a.start(t, id, cfg, sh("sleep 1000"))
	address := a.podStatus(t, id).Network.GetIp()
	pin := a.Pin(t, id)
	a.Kill(t)
	a.run(t, "sh", "-ec", fmt.Sprintf(`cd %s; rm %s; touch %s; mount --bind %s %s; umount %s; rm %s`, a.PinDir, id, id,
		pin, id, pin, pin))
	a.Restart(t)
	if got := a.podStatus(t, id); got.Network.GetIp() != address ||
		got.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("sandbox after the upgrade: %v, want ready with address %s", got, address)
	}

	if a.Pin(t, id) != pin {
		t.Errorf("pin %s, want %s", a.Pin(t, id), pin)
	}
	if mounts := a.run(t, "cat", "/proc/self/mounts"); strings.Contains(mounts, a.PinDir) {
		t.Errorf("mounts remain in the run directory:\n%s", mounts)
	}
	if out := a.run(t, "nsenter", "--net="+pin, "ip", "-o", "addr"); !strings.Contains(out, address+"/") {
		t.Errorf("the pin refers to another namespace: %s", out)
	}

	a.exec(t, c, "true")
	a.removePod(t, id)
	a.assertReleased(t, cfg)
}

// networkFiles installs CNI configurations without a usable network: a stale file of a removed
// add-on, and one with loopback only. It ends with a configuration in which the main plugin manages
// the addresses itself.
func networkFiles(t *testing.T, a *addOn) {
	put := func(name, text string) (remove func()) {
		t.Helper()
		file := filepath.Join(a.conf, name)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return func() { _ = os.Remove(file) }
	}

	remove := put("05-weave.conflist",
		`{"cniVersion":"0.3.0","name":"weave","plugins":[{"name":"weave","type":"weave-net","hairpinMode":true},
		{"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}`)
	a.awaitPromptly(t, "report of the stale file", func() bool {
		s := a.networkCondition(t)
		return s.Status && strings.Contains(s.Message, "05-weave.conflist") &&
			strings.Contains(s.Message, `"weave-net"`)
	})

	cfg := a.addOnPod(t)
	id := a.runPod(t, cfg)
	if ip := a.podStatus(t, id).Network.GetIp(); !strings.HasPrefix(ip, "10.93.0.") {
		t.Errorf("pod address %q, want one of 10.93.0.0/24", ip)
	}

	a.removePod(t, id)
	a.assertReleased(t, cfg)
	remove()

	a.unconfigure(t)
	remove = put("99-loopback.conf", `{"cniVersion":"1.0.0","name":"lo","type":"loopback"}`)
	a.awaitPromptly(t, "report of a configuration without addresses", func() bool {
		s := a.networkCondition(t)
		return !s.Status && strings.Contains(s.Message, "assigns no pod addresses")
	})

	remove()

	azure := "#!/bin/sh\ncat > /dev/null\n" + `case $CNI_COMMAND in
ADD) echo '{"cniVersion":"0.3.0","interfaces":[{"name":"eth0","sandbox":"'$CNI_NETNS'"}],"ips":[{"version":"4","interface":0,"address":"10.92.0.7/24"}]}';;
esac
`

	engines.WriteProgram(t, filepath.Join(a.bin, "azure-vnet"), azure)
	a.configure(t, `{"cniVersion":"0.3.0","name":"azure","plugins":[{"type":"azure-vnet","mode":"transparent",`+
		`"ipam":{"type":"azure-cns","mode":"v4overlay"}}]}`)
	cfg = a.podConfig(t)
	id = a.runPod(t, cfg)
	if ip := a.podStatus(t, id).Network.GetIp(); ip != "10.92.0.7" {
		t.Errorf("pod address %q, want 10.92.0.7", ip)
	}

	a.removePod(t, id)
	a.assertNoLeftovers(t, cfg)
}
