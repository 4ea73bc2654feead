package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// The node's addresses on its outer interface, IPv6 added by the test.
const (
	nodeIP, otherIP = "192.0.2.1", "192.0.2.2"
	nodeIP6         = "2001:db8::1"
)

// cniNode is a node whose network is CNI with the newest plugins.
type cniNode struct {
	*node
	conf string // the configuration directory
	bin  string // the folder of the plugins
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

// configure makes this the only configuration, and waits until the daemon has seen it.
func (c *cniNode) configure(t *testing.T, conf string) {
	t.Helper()
	c.unconfigure(t)
	if err := os.WriteFile(filepath.Join(c.conf, "10-test.conflist"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	c.soon(t, "NetworkReady", func() bool { return c.network(t).Status })
}

func (c *cniNode) unconfigure(t *testing.T) {
	t.Helper()
	if err := os.Remove(filepath.Join(c.conf, "10-test.conflist")); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	c.soon(t, "NetworkReady false", func() bool { return !c.network(t).Status })
}

// soon fails if cond does not come true within the time in which a change must be live.
func (c *cniNode) soon(t *testing.T, what string, cond func() bool) {
	t.Helper()
	began := time.Now()
	eventually(t, what, cond)
	if took := time.Since(began); took > time.Second {
		t.Errorf("%s took %v", what, took)
	}
}

// bridged is a configuration of the standard plugins on a bridge of its own, with both families.
func bridged(version, bridge string, net int) string {
	firewall := `{"type":"firewall"},`
	if version == "0.3.1" {
		firewall = "" // its plugin is younger
	}

	return fmt.Sprintf(`{"cniVersion":%q,"name":%q,"plugins":[
	{"type":"bridge","bridge":%q,"isGateway":true,"ipMasq":true,"hairpinMode":true,"ipam":{"type":"host-local",
		"ranges":[[{"subnet":"10.%d.0.0/24"}],[{"subnet":"fd00:%d::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
	{"type":"portmap","capabilities":{"portMappings":true},"snat":true},
	{"type":"bandwidth","capabilities":{"bandwidth":true}},
	%s
	{"type":"tuning","sysctl":{"net.ipv4.conf.eth0.arp_notify":"1"}}]}`, version, bridge, bridge, net, net, firewall)
}

// in is a pod's network namespace, seen from outside.
func (c *cniNode) in(t *testing.T, pod string) string {
	return c.own(t).NetNS(c.Pin(t, pod))
}

// answer serves what is said in a pod, TCP and UDP on one port of both families, until the test
// ends.
func (c *cniNode) answer(t *testing.T, pod, word string, port int) {
	t.Helper()
	var l net.Listener
	var p net.PacketConn
	err := engines.In(c.in(t, pod), func() (err error) {
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

// ask is what answers at an address, from a network namespace, within a second.
func ask(t *testing.T, netns, network, addr string) string {
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

func (c *cniNode) asked(t *testing.T, netns, network, addr, want string) {
	t.Helper()
	var got string
	if !within(5*time.Second, func() bool { got = ask(t, netns, network, addr); return got == want }) {
		t.Errorf("%s at %s from %s: %q, want %q", network, addr, netns, got, want)
	}
}

// TestStandardPlugins takes the standard plugins through everything that a pod can ask of its
// network.
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
		t.Fatalf("addresses: %v", s)
	}

	c.answer(t, id, "here", 80)
	for _, ip := range []string{s.Ip, s.AdditionalIps[0].Ip} {
		c.asked(t, c.own(t).NetNS(""), "tcp", net.JoinHostPort(ip, "80"), "here")
	}

	r, err := c.Runtime.PodSandboxStatus(t.Context(),
		&runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil || !strings.Contains(r.Info["info"], `"network":"ok"`) {
		t.Errorf("CHECK of a pod in order: %v, %v", r.GetInfo(), err)
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
	c.assertNothingLeft(t, cfg)
}

// hostPorts are of both transports that this kernel has, and of SCTP as a rule; with host addresses
// of both families, two pods sharing a port of different addresses; and from within the pod itself.
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
	c.answer(t, id, "first", 80)
	c.answer(t, second, "second", 80)
	node, pod := c.own(t).NetNS(""), c.in(t, id)
	for _, q := range []struct{ netns, network, addr, want string }{
		{node, "tcp", nodeIP + ":18080", "first"}, {node, "udp", nodeIP + ":18080", "first"},
		{node, "tcp", "[" + nodeIP6 + "]:18080", "first"}, {node, "udp", "[" + nodeIP6 + "]:18080", "first"},
		{node, "tcp", "127.0.0.1:18080", "first"},
		{node, "tcp", nodeIP + ":18081", "first"}, {node, "tcp", otherIP + ":18081", "second"},
		{node, "tcp", "[" + nodeIP6 + "]:18082", "first"},
		{pod, "tcp", nodeIP + ":18080", "first"}, {pod, "tcp", "[" + nodeIP6 + "]:18080", "first"},
		{c.in(t, second), "tcp", nodeIP + ":18080", "first"},
	} {
		c.asked(t, q.netns, q.network, q.addr, q.want)
	}

	if got := ask(t, node, "tcp", nodeIP+":18082"); got == "first" {
		t.Error("a port of the IPv6 address answers at the IPv4 one")
	}
	if rules := c.run(t, "iptables-save"); !strings.Contains(rules, "-p sctp") || !strings.Contains(rules, "18083") {
		t.Errorf("no rule for SCTP:\n%s", rules)
	}

	if ports := c.run(t, "ip", "-d", "-o", "link", "show", "master", "std0"); strings.Count(ports,
		" hairpin on ") != 2 {
		t.Errorf("not both ports of the bridge are in hairpin mode:\n%s", ports)
	}

	c.removePod(t, id)
	c.asked(t, node, "tcp", otherIP+":18081", "second")
	c.removePod(t, second)
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		if rules := c.run(t, save); strings.Contains(rules, "1808") {
			t.Errorf("rules are left:\n%s", rules)
		}
	}

	c.assertNothingLeft(t, cfg)
	c.assertNothingLeft(t, other)
}

// bandwidth measures both directions: 3 MiB at a limit of 1 MB/s.
func bandwidth(t *testing.T, c *cniNode) {
	const bytes, rate = 3 << 20, 1e6 // of rate, bytes per second
	cfg := c.podConfig(t)
	cfg.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "8M", "kubernetes.io/egress-bandwidth": "8M"}
	id := c.runPod(t, cfg)
	node, pod, addr := c.own(t).NetNS(""), c.in(t, id), c.podStatus(t, id).Network.Ip+":9000"
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
			t.Errorf("%s: %.0f bytes per second, the limit is %.0f", direction, got, rate)
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
	c.assertNothingLeft(t, cfg)
}

// vanishedPlugin takes a plugin away while a pod runs: one of the chain, and the one for addresses,
// which another one calls. The pod can go. What is left of its network is released when the plugin
// is back.
func vanishedPlugin(t *testing.T, c *cniNode) {
	for _, plugin := range []string{"bandwidth", "host-local"} {
		vanishes(t, c, plugin)
	}

	if rules := c.run(t, "iptables-save"); strings.Contains(rules, "10.77.0.") {
		t.Errorf("rules are left:\n%s", rules)
	}
	if links := c.run(t, "ip", "-o", "link"); strings.Contains(links, "ifb") || strings.Contains(links, "bwp") {
		t.Errorf("links are left:\n%s", links)
	}
}

func vanishes(t *testing.T, c *cniNode, plugin string) {
	t.Helper()
	cfg := c.podConfig(t)
	cfg.Annotations = map[string]string{
		"kubernetes.io/ingress-bandwidth": "10M",
		"kubernetes.io/egress-bandwidth":  "10M",
	}

	id := c.runPod(t, cfg)
	file := filepath.Join(c.bin, plugin)
	if err := os.Rename(file, file+".gone"); err != nil {
		t.Fatal(err)
	}

	want := fmt.Sprintf("CNI plugin %q is not in ", plugin) + c.bin + ": install it"
	if s := c.network(t); s.Status || !strings.Contains(s.Message, want) {
		t.Errorf("condition: %v", s)
	}

	c.stopPod(t, id)
	if err := os.Rename(file+".gone", file); err != nil {
		t.Fatal(err)
	}

	c.removePod(t, id)
	owed := filepath.Join(filepath.Dir(c.CacheDir), "owed/results/*")
	eventually(t, "what the plugin held is released", func() bool {
		left, _ := filepath.Glob(owed)
		return len(left) == 0
	})

	c.assertNothingLeft(t, cfg)
}

func macvlan(t *testing.T, c *cniNode) {
	c.configure(t, `{"cniVersion":"1.0.0","name":"mac","plugins":[{"type":"macvlan","master":"ext0","mode":"bridge",`+
		`"ipam":{"type":"host-local","ranges":[[{"subnet":"10.78.0.0/24"}]]}}]}`)
	cfg, other := c.podConfig(t), c.podConfig(t)
	id, second := c.runPod(t, cfg), c.runPod(t, other)
	c.answer(t, id, "mac", 80)
	c.asked(t, c.in(t, second), "tcp", c.podStatus(t, id).Network.GetIp()+":80", "mac")
	c.removePod(t, id)
	c.removePod(t, second)
	c.assertNothingLeft(t, cfg)
	c.assertNothingLeft(t, other)
}

// garbage is what plugins have kept for a pod that nobody knows: the next start has them collect it
// (CNI GC), and leaves a running pod alone.
func garbage(t *testing.T, c *cniNode) {
	c.configure(t, bridged("1.1.0", "std0", 77))
	cfg := c.podConfig(t)
	id := c.runPod(t, cfg)
	before := c.podStatus(t, id).Network.String()
	if strings.Contains(c.run(t, "sh", "-c", "cat "+c.Log()), "could not collect") {
		t.Error("the plugins could not collect")
	}

	c.Kill(t)
	c.Restart(t)
	if got := c.podStatus(t, id).Network.String(); got != before {
		t.Errorf("a running pod's addresses were %s, now they are %s", before, got)
	}

	c.answer(t, id, "alive", 80)
	c.asked(t, c.own(t).NetNS(""), "tcp", c.podStatus(t, id).Network.Ip+":80", "alive")
	c.removePod(t, id)
	c.assertNothingLeft(t, cfg)
}

// TestNetworkSwap puts flannel in the place of a bridge under running pods, and then nothing: old
// pods run on, and are torn down with the configuration that they were made with.
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
		c.answer(t, first, "of the bridge", 80)
		env := "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
		c.run(t, "sh", "-c", "mkdir -p /run/flannel /var/lib/cni/flannel && printf '"+env+"' > /run/flannel/subnet.env")
		c.configure(t, `{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel",`+
			`"delegate":{"hairpinMode":true,"isDefaultGateway":true}},{"type":"portmap",`+
			`"capabilities":{"portMappings":true}}]}`)
		second := c.runPod(t, flannel)
		c.answer(t, second, "of flannel", 80)
		ip := c.podStatus(t, second).Network.GetIp()
		if !strings.HasPrefix(ip, "10.244.3.") {
			t.Errorf("flannel gave %s", ip)
		}

		c.unconfigure(t)
		if s := c.network(t); !strings.Contains(s.Message, c.conf) ||
			!strings.Contains(s.Message, "install a network add-on such as flannel") {
			t.Errorf("condition: %v", s)
		}

		c.Kill(t)
		c.Restart(t) // only the cache knows either network now
		node := c.own(t).NetNS("")
		for _, q := range [][2]string{{c.podStatus(t, first).Network.GetIp() + ":80", "of the bridge"},
			{nodeIP + ":18084", "of the bridge"}, {ip + ":80", "of flannel"}, {nodeIP + ":18085", "of flannel"}} {
			c.asked(t, node, "tcp", q[0], q[1])
		}

		c.removePod(t, first)
		c.removePod(t, second)
		c.assertNothingLeft(t, cfg)
		c.assertNothingLeft(t, flannel)
		if rules := c.run(t, "iptables-save"); strings.Contains(rules, "1808") {
			t.Errorf("rules are left:\n%s", rules)
		}

		if left := strings.TrimSpace(c.run(t, "sh", "-c",
			"ls /var/lib/cni/flannel; ip -o link show type veth")); left != "" {
			t.Errorf("left: %s", left)
		}
	})
}

// TestKubenetHairpin has pods reach themselves by their host port in every hairpin mode, with
// bridged frames that pass iptables, as nodes of a cluster have it, and without.
func TestKubenetHairpin(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		c := &cniNode{node: n}
		for _, m := range []struct {
			mode, filter         string
			hairpin, promiscuous bool
		}{
			{"hairpin-veth", "1", true, false}, {"promiscuous-bridge", "1", true, false},
			{"promiscuous-bridge", "0", false, true}, {"none", "0", false, false},
		} {
			n.run(t, "sh", "-c", "ip link del cbr0 2>/dev/null; f=/proc/sys/net/bridge/bridge-nf-call-iptables; [ ! "+
				"-e $f ] || echo $1 > $f", "sh", m.filter)
			n.Change(t, "--hairpin-mode="+m.mode, "--network-plugin-mtu=1400")
			n.AwaitReady(t)
			cfg := n.podConfig(t)
			cfg.PortMappings = []*runtimeapi.PortMapping{{
				Protocol:      runtimeapi.Protocol_TCP,
				ContainerPort: 80,
				HostPort:      18086,
			}}

			id := n.runPod(t, cfg)
			c.answer(t, id, m.mode, 80)
			c.asked(t, c.in(t, id), "tcp", nodeIP+":18086", m.mode)
			if link := n.run(t, "nsenter", "--net="+filepath.Join(n.PinDir, id), "ip", "-o", "link", "show",
				"eth0"); !strings.Contains(link, " mtu 1400 ") {
				t.Errorf("MTU of the pod: %s", link)
			}

			hairpin := strings.Contains(n.run(t, "ip", "-d", "-o", "link", "show", "master", "cbr0"), " hairpin on ")
			promiscuous := strings.Contains(n.run(t, "ip", "-o", "link", "show", "cbr0"), "PROMISC")
			if hairpin != m.hairpin || promiscuous != m.promiscuous {
				t.Errorf("%+v: hairpin %v, promiscuous %v", m, hairpin, promiscuous)
			}

			n.removePod(t, id)
			n.assertNothingLeft(t, cfg)
		}
	})
}

// TestKubenetFollowsTheKubelet gives kubenet its ranges by UpdateRuntimeConfig, and others under a
// running pod.
func TestKubenetFollowsTheKubelet(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		c := &cniNode{node: n.withDaemon(t, "--pod-cidr=")}
		n = c.node
		if s := n.network(t); s.Status || !strings.Contains(s.Message, "pod CIDR") {
			t.Errorf("condition: %v", s)
		}

		var pods []string
		var configs []*runtimeapi.PodSandboxConfig
		for i, prefix := range []string{"10.91.0.", "10.92.0."} {
			cidrs := fmt.Sprintf("%s0/24,fd00:%d::/64", prefix, 91+i)
			if _, err := n.Runtime.UpdateRuntimeConfig(t.Context(), &runtimeapi.UpdateRuntimeConfigRequest{
				RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: cidrs}},
			}); err != nil || !n.network(t).Status {
				t.Fatalf("%v, %v", err, n.network(t))
			}

			cfg := n.podConfig(t)
			id := n.runPod(t, cfg)
			if s := n.podStatus(t, id).Network; !strings.HasPrefix(s.GetIp(), prefix) || len(s.AdditionalIps) != 1 ||
				!strings.HasPrefix(s.AdditionalIps[0].Ip, fmt.Sprintf("fd00:%d::", 91+i)) {
				t.Errorf("addresses of %s: %v", cidrs, s)
			}

			c.answer(t, id, prefix, 80)
			pods, configs = append(pods, id), append(configs, cfg)
		}

		first := n.podStatus(t, pods[0]).Network
		for _, ip := range []string{first.Ip, first.AdditionalIps[0].Ip} {
			c.asked(t, c.own(t).NetNS(""), "tcp", net.JoinHostPort(ip, "80"), "10.91.0.")
			c.asked(t, c.in(t, pods[1]), "tcp", net.JoinHostPort(ip, "80"), "10.91.0.")
		}

		for i, id := range pods {
			n.removePod(t, id)
			n.assertNothingLeft(t, configs[i])
		}
	})
}
