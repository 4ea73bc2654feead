package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// Addresses of the node on its external interface. The test adds the second one and IPv6.
const (
	nodeIP, otherIP = "192.0.2.1", "192.0.2.2"
	nodeIP6         = "2001:db8::1"
)

// cniNode is a node on a CNI network with the newest plugins.
type cniNode struct {
	*node
	conf string // directory of the configurations
	bin  string // directory of the plugins
}

func newCNINode(t *testing.T, n *node) *cniNode {
	t.Helper()
	c := &cniNode{conf: filepath.Join(n.tempDir(t), "net.d"), bin: filepath.Join(n.tempDir(t), "bin")}
	n.run(t, "cp", "-r", engines.Plugins(), c.bin)
	n.run(t, "mkdir", "-p", c.conf)
	n.run(t, "ip", "addr", "add", otherIP+"/24", "dev", "ext0")
	n.run(t, "ip", "-6", "addr", "add", nodeIP6+"/64", "dev", "ext0", "nodad")
	n.run(t, "ip", "-6", "route", "add", "default", "via", "2001:db8::2", "dev", "ext0")
	c.node = n.withDaemon(t, "--network-plugin=cni", "--cni-conf-dir="+c.conf, "--cni-bin-dir="+c.bin, "--pod-cidr=")

	return c
}

// configure replaces the CNI configuration and waits until the daemon has loaded it.
func (c *cniNode) configure(t *testing.T, conf string) {
	t.Helper()
	c.unconfigure(t)
	if err := os.WriteFile(filepath.Join(c.conf, "10-test.conflist"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	c.awaitPromptly(t, "NetworkReady", func() bool { return c.networkCondition(t).Status })
}

func (c *cniNode) unconfigure(t *testing.T) {
	t.Helper()
	if err := os.Remove(filepath.Join(c.conf, "10-test.conflist")); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	c.awaitPromptly(t, "NetworkReady false", func() bool { return !c.networkCondition(t).Status })
}

// awaitPromptly waits until cond holds and fails if that takes longer than the limit for
// configuration changes.
func (c *cniNode) awaitPromptly(t *testing.T, condition string, cond func() bool) {
	t.Helper()
	began := time.Now()
	eventually(t, condition, cond)
	if took := time.Since(began); took > scaled(time.Second) {
		t.Errorf("%s took %v, want at most 1 s", condition, took)
	}
}

// bridged returns a configuration of the standard plugins with a new bridge and both IP families.
func bridged(version, bridge string, net int) string {
	firewall := `{"type":"firewall"},`
	if version == "0.3.1" {
		firewall = "" // the plugin requires a newer version
	}

	return fmt.Sprintf(`{"cniVersion":%q,"name":%q,"plugins":[
	{"type":"bridge","bridge":%q,"isGateway":true,"ipMasq":true,"hairpinMode":true,"ipam":{"type":"host-local",
		"ranges":[[{"subnet":"10.%d.0.0/24"}],[{"subnet":"fd00:%d::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
	{"type":"portmap","capabilities":{"portMappings":true},"snat":true},
	{"type":"bandwidth","capabilities":{"bandwidth":true}},
	%s
	{"type":"tuning","sysctl":{"net.ipv4.conf.eth0.arp_notify":"1"}}]}`, version, bridge, bridge, net, net, firewall)
}

// podNetNS returns the path of a pod's network namespace outside of the engine's mount namespace.
func (c *cniNode) podNetNS(t *testing.T, pod string) string {
	return c.own(t).NetNS(c.Pin(t, pod))
}

// serveWord serves a word in a pod, over TCP and UDP on one port of both families, until the test
// ends.
func (c *cniNode) serveWord(t *testing.T, pod, word string, port int) {
	t.Helper()
	var l net.Listener
	var p net.PacketConn
	err := engines.In(c.podNetNS(t, pod), func() (err error) {
		if l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		p, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { l.Close(); p.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, word)
			conn.Close()
		}
	}()

	go func() {
		for b := make([]byte, 100); ; {
			_, from, err := p.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = p.WriteTo([]byte(word), from)
		}
	}()
}

// query returns the response of an address, or the error, within a second.
func query(t *testing.T, netns, network, addr string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()

	conn, err := engines.Dial(ctx, netns, network, addr)
	if err != nil {
		return err.Error()
	}
	defer conn.Close()

	_ = conn.SetDeadline(time.Now().Add(time.Second))
	if network == "udp" {
		if _, err := conn.Write([]byte("?")); err != nil {
			return err.Error()
		}
	}

	b := make([]byte, 100)
	n, err := conn.Read(b)
	if err != nil {
		return err.Error()
	}

	return string(b[:n])
}

// assertServed checks the response of an address within 20 seconds.
func (c *cniNode) assertServed(t *testing.T, netns, network, addr, want string) {
	t.Helper()
	var got string
	if !within(20*time.Second, func() bool { got = query(t, netns, network, addr); return got == want }) {
		t.Errorf("%s at %s from %s: %q, want %q", network, addr, netns, got, want)
	}
}

// TestStandardPlugins tests the standard plugins with every network feature of a pod.
func TestStandardPlugins(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		c := newCNINode(t, n)
		for _, version := range []string{"0.3.1", "1.1.0"} {
			c.configure(t, bridged(version, "std0", 77))
			t.Run("dual stack "+version, func(t *testing.T) { dualStack(t, c) })
		}

		t.Run("host ports", func(t *testing.T) { hostPorts(t, c) })
		t.Run("bandwidth", func(t *testing.T) { bandwidth(t, c) })
		t.Run("vanished plugin", func(t *testing.T) { vanishedPlugin(t, c) })
		t.Run("macvlan", func(t *testing.T) { macvlan(t, c) })
		t.Run("garbage", func(t *testing.T) { garbage(t, c) })
	})
}

func dualStack(t *testing.T, c *cniNode) {
	cfg := c.podConfig(t)
	id := c.runPod(t, cfg)
	s := c.podStatus(t, id).Network
	if !strings.HasPrefix(s.GetIp(), "10.77.0.") || len(s.AdditionalIps) != 1 ||
		!strings.HasPrefix(s.AdditionalIps[0].Ip, "fd00:77::") {
		t.Fatalf("addresses %v, want one of each family", s)
	}

	c.serveWord(t, id, "here", 80)
	for _, ip := range []string{s.Ip, s.AdditionalIps[0].Ip} {
		c.assertServed(t, c.own(t).NetNS(""), "tcp", net.JoinHostPort(ip, "80"), "here")
	}

	r, err := c.Runtime.PodSandboxStatus(t.Context(),
		&runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil || !strings.Contains(r.Info["info"], `"network":"ok"`) {
		t.Errorf("CHECK of a healthy pod: %v, %v", r.GetInfo(), err)
	}

	if strings.Contains(t.Name(), "1.1.0") {
		c.run(t, "nsenter", "--net="+filepath.Join(c.PinDir, id), "ip", "route", "del", "default")
		if r, err = c.Runtime.PodSandboxStatus(t.Context(),
			&runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true}); err != nil ||
			!strings.Contains(r.Info["info"], `plugin type`) && !strings.Contains(r.Info["info"], "CNI error") {
			t.Errorf("CHECK of a pod without its route: %v, %v", r.GetInfo(), err)
		}
	}

	c.removePod(t, id)
	c.assertNoLeftovers(t, cfg)
}

// hostPorts tests TCP and UDP, and SCTP as a rule only. It uses host addresses of both families,
// two pods with one port on different addresses, and connections from within the pod itself.
func hostPorts(t *testing.T, c *cniNode) {
	cfg, other := c.podConfig(t), c.podConfig(t)
	cfg.PortMappings = []*runtimeapi.PortMapping{
		{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 18080},
		{Protocol: runtimeapi.Protocol_UDP, ContainerPort: 80, HostPort: 18080},
		{Protocol: runtimeapi.Protocol_SCTP, ContainerPort: 80, HostPort: 18083},
		{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 18081, HostIp: nodeIP},
		{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 18082, HostIp: nodeIP6},
	}

	other.PortMappings = []*runtimeapi.PortMapping{{
		Protocol:      runtimeapi.Protocol_TCP,
		ContainerPort: 80,
		HostPort:      18081,
		HostIp:        otherIP,
	}}

	id, second := c.runPod(t, cfg), c.runPod(t, other)
	c.serveWord(t, id, "first", 80)
	c.serveWord(t, second, "second", 80)
	node, pod := c.own(t).NetNS(""), c.podNetNS(t, id)
	for _, q := range []struct{ netns, network, addr, want string }{
		{node, "tcp", nodeIP + ":18080", "first"},
		{node, "udp", nodeIP + ":18080", "first"},
		{node, "tcp", "[" + nodeIP6 + "]:18080", "first"},
		{node, "udp", "[" + nodeIP6 + "]:18080", "first"},
		{node, "tcp", "127.0.0.1:18080", "first"},
		{node, "tcp", nodeIP + ":18081", "first"},
		{node, "tcp", otherIP + ":18081", "second"},
		{node, "tcp", "[" + nodeIP6 + "]:18082", "first"},
		{pod, "tcp", nodeIP + ":18080", "first"},
		{pod, "tcp", "[" + nodeIP6 + "]:18080", "first"},
		{c.podNetNS(t, second), "tcp", nodeIP + ":18080", "first"},
	} {
		t.Run(q.network+" "+q.addr+" in "+filepath.Base(q.netns), func(t *testing.T) {
			c.assertServed(t, q.netns, q.network, q.addr, q.want)
		})
	}

	if got := query(t, node, "tcp", nodeIP+":18082"); got == "first" {
		t.Error("a host port of the IPv6 address is open on the IPv4 address")
	}
	if rules := c.run(t, "iptables-save"); !strings.Contains(rules, "-p sctp") || !strings.Contains(rules, "18083") {
		t.Errorf("no iptables rule for SCTP:\n%s", rules)
	}

	ports := c.run(t, "ip", "-d", "-o", "link", "show", "master", "std0")
	if strings.Count(ports, " hairpin on ") != 2 {
		t.Errorf("want both ports of the bridge in hairpin mode:\n%s", ports)
	}

	c.removePod(t, id)
	c.assertServed(t, node, "tcp", otherIP+":18081", "second")
	c.removePod(t, second)
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		if rules := c.run(t, save); strings.Contains(rules, "1808") {
			t.Errorf("iptables rules remain:\n%s", rules)
		}
	}

	c.assertNoLeftovers(t, cfg)
	c.assertNoLeftovers(t, other)
}

// bandwidth measures 3 MiB at a limit of 1 MB/s in both directions.
func bandwidth(t *testing.T, c *cniNode) {
	const bytes, rate = 3 << 20, 1e6 // of rate, bytes per second
	cfg := c.podConfig(t)
	cfg.Annotations = map[string]string{
		"kubernetes.io/ingress-bandwidth": "8M",
		"kubernetes.io/egress-bandwidth":  "8M",
	}

	id := c.runPod(t, cfg)
	node, pod, addr := c.own(t).NetNS(""), c.podNetNS(t, id), c.podStatus(t, id).Network.Ip+":9000"
	var l net.Listener
	if err := engines.In(pod, func() (err error) { l, err = net.Listen("tcp", ":9000"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	go func() { // one connection reads, the next writes
		if conn, err := l.Accept(); err == nil {
			_, _ = io.Copy(io.Discard, conn)
			conn.Close()
		}

		if conn, err := l.Accept(); err == nil {
			_, _ = conn.Write(make([]byte, bytes))
			conn.Close()
		}
	}()

	measure := func(direction string, transfer func(net.Conn) error) {
		t.Helper()
		conn, err := engines.Dial(t.Context(), node, "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()

		began := time.Now()
		if err := transfer(conn); err != nil {
			t.Fatal(err)
		}

		got := bytes / time.Since(began).Seconds()
		t.Logf("%s: %.2f of the limit", direction, got/rate)
		if got < 0.7*rate || got > 1.3*rate {
			t.Errorf("%s: %.0f bytes per second, want %.0f ± 30 %%", direction, got, rate)
		}
	}

	measure("ingress", func(conn net.Conn) error {
		_, err := conn.Write(make([]byte, bytes))
		if err == nil {
			err = conn.(*net.TCPConn).CloseWrite()
		}
		_, readErr := io.Copy(io.Discard, conn) // until the pod has read all
		return errors.Join(err, readErr)
	})

	measure("egress", func(conn net.Conn) error {
		n, err := io.Copy(io.Discard, conn)
		if n != bytes {
			err = fmt.Errorf("%d bytes, %w", n, err)
		}
		return err
	})

	c.removePod(t, id)
	c.assertNoLeftovers(t, cfg)
}

// vanishedPlugin removes a plugin while a pod runs: one of the chain, or the IPAM plugin called by
// another. The pod can be removed. Its remaining network state is released after the plugin is
// reinstalled.
func vanishedPlugin(t *testing.T, c *cniNode) {
	for _, plugin := range []string{"bandwidth", "host-local"} {
		t.Run(plugin, func(t *testing.T) {
			removePluginUnderPod(t, c, plugin)
		})
	}

	if rules := c.run(t, "iptables-save"); strings.Contains(rules, "10.77.0.") {
		t.Errorf("iptables rules remain:\n%s", rules)
	}
	if links := c.run(t, "ip", "-o", "link"); regexp.MustCompile(`: (ifb|bwp)`).MatchString(links) {
		t.Errorf("links remain:\n%s", links)
	}
}

func removePluginUnderPod(t *testing.T, c *cniNode, plugin string) {
	t.Helper()
	cfg := c.podConfig(t)
	cfg.Annotations = map[string]string{
		"kubernetes.io/ingress-bandwidth": "10M",
		"kubernetes.io/egress-bandwidth":  "10M",
	}

	id := c.runPod(t, cfg)
	file := filepath.Join(c.bin, plugin)
	if err := os.Rename(file, file+".removed"); err != nil {
		t.Fatal(err)
	}

	want := fmt.Sprintf("CNI plugin %q is not in ", plugin) + c.bin + ": install it"
	if s := c.networkCondition(t); s.Status || !strings.Contains(s.Message, want) {
		t.Errorf("condition NetworkReady: %v, want %q", s, want)
	}

	c.stopPod(t, id)
	if err := os.Rename(file+".removed", file); err != nil {
		t.Fatal(err)
	}

	c.removePod(t, id)
	owed := filepath.Join(filepath.Dir(c.CacheDir), "owed/results/*")
	eventually(t, "release of the plugin's state", func() bool {
		files, _ := filepath.Glob(owed)
		return len(files) == 0
	})

	c.assertNoLeftovers(t, cfg)
}

func macvlan(t *testing.T, c *cniNode) {
	c.configure(t, `{"cniVersion":"1.0.0","name":"mac","plugins":[{"type":"macvlan","master":"ext0","mode":"bridge",`+
		`"ipam":{"type":"host-local","ranges":[[{"subnet":"10.78.0.0/24"}]]}}]}`)
	cfg, other := c.podConfig(t), c.podConfig(t)
	id, second := c.runPod(t, cfg), c.runPod(t, other)
	c.serveWord(t, id, "mac", 80)
	c.assertServed(t, c.podNetNS(t, second), "tcp", c.podStatus(t, id).Network.GetIp()+":80", "mac")
	c.removePod(t, id)
	c.removePod(t, second)
	c.assertNoLeftovers(t, cfg)
	c.assertNoLeftovers(t, other)
}

// garbage checks that the start of the daemon has the plugins collect garbage (CNI GC), and that
// running pods are not affected.
func garbage(t *testing.T, c *cniNode) {
	c.configure(t, bridged("1.1.0", "std0", 77))
	cfg := c.podConfig(t)
	id := c.runPod(t, cfg)
	before := c.podStatus(t, id).Network.String()
	if strings.Contains(c.run(t, "sh", "-c", "cat "+c.Log()), "could not collect") {
		t.Error("the garbage collection failed")
	}

	c.Kill(t)
	c.Restart(t)
	if got := c.podStatus(t, id).Network.String(); got != before {
		t.Errorf("addresses of the running pod changed from %s to %s", before, got)
	}

	c.serveWord(t, id, "alive", 80)
	c.assertServed(t, c.own(t).NetNS(""), "tcp", c.podStatus(t, id).Network.Ip+":80", "alive")
	c.removePod(t, id)
	c.assertNoLeftovers(t, cfg)
}

// TestNetworkSwap replaces a bridge with flannel under running pods, and then removes the
// configuration. Old pods keep running and are torn down with their original configuration.
func TestNetworkSwap(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		c := newCNINode(t, n)
		c.configure(t, bridged("1.0.0", "old0", 81))
		cfg, flannel := c.podConfig(t), c.podConfig(t)
		cfg.PortMappings = []*runtimeapi.PortMapping{{
			Protocol:      runtimeapi.Protocol_TCP,
			ContainerPort: 80,
			HostPort:      18084,
		}}

		flannel.PortMappings = []*runtimeapi.PortMapping{{
			Protocol:      runtimeapi.Protocol_TCP,
			ContainerPort: 80,
			HostPort:      18085,
		}}

		first := c.runPod(t, cfg)
		c.serveWord(t, first, "of the bridge", 80)
		env := "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
		c.run(t, "sh", "-c",
			"mkdir -p /run/flannel /var/lib/cni/flannel && printf '"+env+"' > /run/flannel/subnet.env")
		c.configure(t, `{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel",`+
			`"delegate":{"hairpinMode":true,"isDefaultGateway":true}},{"type":"portmap",`+
			`"capabilities":{"portMappings":true}}]}`)
		second := c.runPod(t, flannel)
		c.serveWord(t, second, "of flannel", 80)
		ip := c.podStatus(t, second).Network.GetIp()
		if !strings.HasPrefix(ip, "10.244.3.") {
			t.Errorf("address %s, want one of 10.244.3.0/24", ip)
		}

		c.unconfigure(t)
		if s := c.networkCondition(t); !strings.Contains(s.Message, c.conf) ||
			!strings.Contains(s.Message, "install a network add-on such as flannel") {
			t.Errorf("condition NetworkReady: %v", s)
		}

		c.Kill(t)
		c.Restart(t) // now only the cache has both configurations
		node := c.own(t).NetNS("")
		for _, q := range [][2]string{
			{c.podStatus(t, first).Network.GetIp() + ":80", "of the bridge"},
			{nodeIP + ":18084", "of the bridge"},
			{ip + ":80", "of flannel"},
			{nodeIP + ":18085", "of flannel"},
		} {
			c.assertServed(t, node, "tcp", q[0], q[1])
		}

		c.removePod(t, first)
		c.removePod(t, second)
		c.assertNoLeftovers(t, cfg)
		c.assertNoLeftovers(t, flannel)
		if rules := c.run(t, "iptables-save"); strings.Contains(rules, "1808") {
			t.Errorf("iptables rules remain:\n%s", rules)
		}

		state := strings.TrimSpace(c.run(t, "sh", "-c", "ls /var/lib/cni/flannel; ip -o link show type veth"))
		if state != "" {
			t.Errorf("state of flannel remains: %s", state)
		}
	})
}
