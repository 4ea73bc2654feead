package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// network is the NetworkReady condition.
func (n *node) network(t *testing.T) *runtimeapi.RuntimeCondition {
	t.Helper()
	return n.condition(t, runtimeapi.NetworkReady)
}

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
		if c := n.network(t); !c.Status || !strings.Contains(c.Message, "--network-plugin=cni") {
			t.Errorf("condition: %v", c)
		}

		ip := n.podStatus(t, id).Network.GetIp()
		if !strings.HasPrefix(ip, "172.17.") {
			t.Errorf("address %q is not of the engine's bridge", ip)
		}

		n.start(t, id, cfg, sh("mkdir /www; echo page of the pod > /www/index.html; exec httpd -f -p 8080 -h /www"))
		eventually(t, "page at the pod IP", func() bool {
			return strings.Contains(n.get(ip+":8080"), "page of the pod")
		})
		eventually(t, "page at the host port", func() bool {
			return strings.Contains(n.get("192.0.2.1:18082"), "page of the pod")
		})
		n.removePod(t, id)
		n.assertNothingLeft(t, cfg)
		if b, err := os.ReadFile(n.Log()); err != nil || !strings.Contains(string(b), "level=WARN") ||
			!strings.Contains(string(b), "no network plugin") {
			t.Errorf("the daemon did not warn: %v", err)
		}
	})
}

func TestCNINetwork(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		conf := filepath.Join(n.tempDir(t), "net.d")
		n = n.withDaemon(t, "--network-plugin=cni", "--cni-conf-dir="+conf, "--pod-cidr=")
		if c := n.network(t); c.Status || !strings.Contains(c.Message, conf) {
			t.Errorf("without a configuration: %v", c)
		}

		host := n.podConfig(t)
		host.Hostname, host.Linux.SecurityContext.NamespaceOptions.Network = "", runtimeapi.NamespaceMode_NODE
		n.runPod(t, host) // runs meanwhile
		if err := os.Mkdir(conf, 0o755); err != nil {
			t.Fatal(err)
		}

		if err := os.WriteFile(filepath.Join(conf, "10-test.conflist"),
			[]byte(`{"cniVersion":"0.4.0","name":"test","plugins":[
			{"type":"bridge","bridge":"test0","isGateway":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}],[{"subnet":"fd00:77::/64"}]]}}]}`), 0o644); err != nil {
			t.Fatal(err)
		}

		eventually(t, "NetworkReady", func() bool { return n.network(t).Status })
		cfg := n.podConfig(t)
		id := n.runPod(t, cfg)
		s := n.podStatus(t, id).Network
		if !strings.HasPrefix(s.GetIp(), "10.77.0.") || len(s.AdditionalIps) != 1 ||
			!strings.HasPrefix(s.AdditionalIps[0].Ip, "fd00:77::") {
			t.Errorf("addresses: %v", s)
		}

		if err := os.Remove(filepath.Join(conf, "10-test.conflist")); err != nil {
			t.Fatal(err)
		}

		eventually(t, "NetworkReady false again", func() bool { return !n.network(t).Status })
		n.removePod(t, id) // with the configuration that it was made with
		n.assertNothingLeft(t, cfg)
	})
}
