package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// networkCondition returns the condition NetworkReady.
func (n *node) networkCondition(t *testing.T) *runtimeapi.RuntimeCondition {
	t.Helper()
	return n.condition(t, runtimeapi.NetworkReady)
}

// TestNoopNetwork runs pods on the engine's bridge, with a warning.
func TestNoopNetwork(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n = n.withDaemon(t, "--network-plugin=", "--pod-cidr=")
		cfg := n.podConfig(t)
		cfg.PortMappings = []*runtimeapi.PortMapping{{
			Protocol:      runtimeapi.Protocol_TCP,
			ContainerPort: 8080,
			HostPort:      18082,
		}}

		id := n.runPod(t, cfg)
		if c := n.networkCondition(t); !c.Status || !strings.Contains(c.Message, "--network-plugin=cni") {
			t.Errorf("condition NetworkReady: %v", c)
		}

		ip := n.podStatus(t, id).Network.GetIp()
		if !strings.HasPrefix(ip, "172.17.") {
			t.Errorf("address %q, want one of the engine's bridge", ip)
		}

		n.start(t, id, cfg, sh("mkdir /www; echo page of the pod > /www/index.html; exec httpd -f -p 8080 -h /www"))
		eventually(t, "page at the pod's address", func() bool {
			return strings.Contains(n.get(ip+":8080"), "page of the pod")
		})
		eventually(t, "page at the host port", func() bool {
			return strings.Contains(n.get("192.0.2.1:18082"), "page of the pod")
		})
		n.removePod(t, id)
		n.assertNoLeftovers(t, cfg)
		if b, err := os.ReadFile(n.Log()); err != nil || !strings.Contains(string(b), "level=WARN") ||
			!strings.Contains(string(b), "no network plugin") {
			t.Errorf("the log has no warning about the missing plugin: %v", err)
		}
	})
}

// TestCNINetwork installs and removes a CNI configuration while the daemon runs.
func TestCNINetwork(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		conf := filepath.Join(n.tempDir(t), "net.d")
		n = n.withDaemon(t, "--network-plugin=cni", "--cni-conf-dir="+conf, "--pod-cidr=")
		if c := n.networkCondition(t); c.Status || !strings.Contains(c.Message, conf) {
			t.Errorf("condition NetworkReady without a configuration: %v", c)
		}

		host := n.podConfig(t)
		host.Hostname, host.Linux.SecurityContext.NamespaceOptions.Network = "", runtimeapi.NamespaceMode_NODE
		n.runPod(t, host) // needs no network
		if err := os.Mkdir(conf, 0o755); err != nil {
			t.Fatal(err)
		}

		if err := os.WriteFile(filepath.Join(conf, "10-test.conflist"),
			[]byte(`{"cniVersion":"0.4.0","name":"test","plugins":[{"type":"bridge","bridge":"test0","isGateway":true,
			"ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}],[{"subnet":"fd00:77::/64"}]]}}]}`),
			0o644); err != nil {
			t.Fatal(err)
		}

		eventually(t, "NetworkReady", func() bool { return n.networkCondition(t).Status })
		cfg := n.podConfig(t)
		id := n.runPod(t, cfg)
		s := n.podStatus(t, id).Network
		if !strings.HasPrefix(s.GetIp(), "10.77.0.") || len(s.AdditionalIps) != 1 ||
			!strings.HasPrefix(s.AdditionalIps[0].Ip, "fd00:77::") {
			t.Errorf("addresses %v, want one of each family", s)
		}

		if err := os.Remove(filepath.Join(conf, "10-test.conflist")); err != nil {
			t.Fatal(err)
		}

		eventually(t, "NetworkReady false", func() bool { return !n.networkCondition(t).Status })
		n.removePod(t, id) // with the cached configuration
		n.assertNoLeftovers(t, cfg)
	})
}
