package conformance

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestKubenetHairpin connects pods to themselves through their host port in every hairpin mode.
// Bridged frames pass iptables, as on cluster nodes, or bypass it.
func TestKubenetHairpin(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		c := &cniNode{node: n}
		for _, m := range []struct {
			mode, filter         string
			hairpin, promiscuous bool
		}{
			{"hairpin-veth", "1", true, false},
			{"promiscuous-bridge", "1", true, false},
			{"promiscuous-bridge", "0", false, true},
			{"none", "0", false, false},
		} {
			t.Run(m.mode+", filter "+m.filter, func(t *testing.T) {
				n.run(t, "sh", "-c", "ip link del cbr0 2>/dev/null; f=/proc/sys/net/bridge/bridge-nf-call-iptables; "+
					"[ ! -e $f ] || echo $1 > $f", "sh", m.filter)
				n.Change(t, "--hairpin-mode="+m.mode, "--network-plugin-mtu=1400")
				n.AwaitReady(t)
				cfg := n.podConfig(t)
				cfg.PortMappings = []*runtimeapi.PortMapping{{
					Protocol:      runtimeapi.Protocol_TCP,
					ContainerPort: 80,
					HostPort:      18086,
				}}

				id := n.runPod(t, cfg)
				c.serveWord(t, id, m.mode, 80)
				c.assertServed(t, c.podNetNS(t, id), "tcp", nodeIP+":18086", m.mode)
				netns := "--net=" + filepath.Join(n.PinDir, id)
				link := n.run(t, "nsenter", netns, "ip", "-o", "link", "show", "eth0")
				if !strings.Contains(link, " mtu 1400 ") {
					t.Errorf("link of the pod: %s, want MTU 1400", link)
				}

				ports := n.run(t, "ip", "-d", "-o", "link", "show", "master", "cbr0")
				hairpin := strings.Contains(ports, " hairpin on ")
				promiscuous := strings.Contains(n.run(t, "ip", "-o", "link", "show", "cbr0"), "PROMISC")
				if hairpin != m.hairpin || promiscuous != m.promiscuous {
					t.Errorf("hairpin %t, promiscuous %t, want %+v", hairpin, promiscuous, m)
				}

				n.removePod(t, id)
				n.assertNoLeftovers(t, cfg)
			})
		}
	})
}

// TestKubenetFollowsTheKubelet sets kubenet's ranges with UpdateRuntimeConfig, and changes them
// under a running pod.
func TestKubenetFollowsTheKubelet(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		c := &cniNode{node: n.withDaemon(t, "--pod-cidr=")}
		n = c.node
		if s := n.networkCondition(t); s.Status || !strings.Contains(s.Message, "pod CIDR") {
			t.Errorf("condition NetworkReady: %v", s)
		}

		var pods []string
		var configs []*runtimeapi.PodSandboxConfig
		for i, prefix := range []string{"10.91.0.", "10.92.0."} {
			cidrs := fmt.Sprintf("%s0/24,fd00:%d::/64", prefix, 91+i)
			if _, err := n.Runtime.UpdateRuntimeConfig(t.Context(), &runtimeapi.UpdateRuntimeConfigRequest{
				RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: cidrs}},
			}); err != nil || !n.networkCondition(t).Status {
				t.Fatalf("UpdateRuntimeConfig: %v, %v", err, n.networkCondition(t))
			}

			cfg := n.podConfig(t)
			id := n.runPod(t, cfg)
			if s := n.podStatus(t, id).Network; !strings.HasPrefix(s.GetIp(), prefix) || len(s.AdditionalIps) != 1 ||
				!strings.HasPrefix(s.AdditionalIps[0].Ip, fmt.Sprintf("fd00:%d::", 91+i)) {
				t.Errorf("addresses of %s: %v", cidrs, s)
			}

			c.serveWord(t, id, prefix, 80)
			pods, configs = append(pods, id), append(configs, cfg)
		}

		first := n.podStatus(t, pods[0]).Network
		for _, ip := range []string{first.Ip, first.AdditionalIps[0].Ip} {
			c.assertServed(t, c.own(t).NetNS(""), "tcp", net.JoinHostPort(ip, "80"), "10.91.0.")
			c.assertServed(t, c.podNetNS(t, pods[1]), "tcp", net.JoinHostPort(ip, "80"), "10.91.0.")
		}

		for i, id := range pods {
			n.removePod(t, id)
			n.assertNoLeftovers(t, configs[i])
		}
	})
}
