package cluster

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// podNetwork is a pod network that a cluster can have. The functions are called in the order of the
// fields. A nil function has nothing to do. Each fails the test on an error.
type podNetwork struct {
	// addresses is the prefix of all pod addresses, for example "10.244.".
	addresses string

	// hostLocal reports that host-local reserves the addresses, and that cni0 connects the pods.
	hostLocal bool

	// kubeadmArgs are further arguments of kubeadm init, for example to omit kube-proxy.
	kubeadmArgs []string

	// configure adds programs (Binds) and files to the configuration of a node before it boots.
	configure func(t *testing.T, c *nodes.Config)

	// prepare loads images and changes the state of a node after its boot and before kubeadm.
	prepare func(t *testing.T, n *nodes.Node)

	// install installs the network in a cluster with the control plane only, as on the page for
	// users. It must not wait for ready nodes.
	install func(t *testing.T, c *cluster)

	// connect completes the network after all nodes have joined. Afterwards all nodes become ready.
	connect func(t *testing.T, c *cluster)

	// test checks what only this network has. It runs as a subtest after the tests of the cluster.
	test func(t *testing.T, c *cluster)
}

// networks has the pod networks by the value of -cni.
var networks = map[string]podNetwork{
	"flannel": {
		addresses: "10.244.",
		hostLocal: true,
		configure: standardPlugins,
		prepare:   loadFlannel,
		install:   func(t *testing.T, c *cluster) { c.apply(t, "flannel.yaml") },
	},
	"bridge": {
		addresses: "10.244.",
		hostLocal: true,
		configure: standardPlugins,
		connect:   connectBridges,
	},
	"cilium":               newCilium("cilium.yaml", "10.244.", false),
	"cilium-no-kube-proxy": newCilium("cilium-no-kube-proxy.yaml", "10.42.", true),
}

// standardPlugins adds the standard plugins that a distribution's package has.
func standardPlugins(_ *testing.T, c *nodes.Config) {
	for _, p := range []string{"bridge", "host-local", "loopback", "portmap"} {
		c.Binds["/opt/cni/bin/"+p] = filepath.Join(engines.Plugins(), p)
	}
}

// loadFlannel creates the image of flannel.yaml, which has the plugin and flanneld.
func loadFlannel(t *testing.T, n *nodes.Node) {
	t.Helper()
	i := newImage(t).iptables()
	i.add("/flannel", filepath.Join(engines.Plugins(), "flannel"))
	loadProgram(t, n, "cri-test/flannel:latest", i, "flanneld")
}

// bridgeConfig is the configuration of the standard plugin bridge. %s is the node's pod CIDR.
const bridgeConfig = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "%s"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
`

// forwardRules are the rules that an add-on sets: packets from and to pods are forwarded, with the
// pod's address inside of the pod network and with the node's outside.
const forwardRules = `iptables -I FORWARD -s 10.244.0.0/16 -j ACCEPT
iptables -I FORWARD -d 10.244.0.0/16 -j ACCEPT
iptables -t nat -A POSTROUTING -s 10.244.0.0/16 ! -d 10.244.0.0/16 -j MASQUERADE
`

// routesUnit sets the routes to the pods of other nodes at each boot.
const routesUnit = `[Unit]
Description=Routes to the pods of other nodes
Before=cri-docker.service kubelet.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -e /etc/pod-routes.sh

[Install]
WantedBy=multi-user.target
`

// connectBridges configures the bridge of each node with its pod CIDR, and the routes to the pods
// of the other nodes.
func connectBridges(t *testing.T, c *cluster) {
	t.Helper()
	cidrs := map[*nodes.Node]string{}
	for _, n := range c.nodes {
		n.Await(t, timeout, "pod CIDR", func() bool {
			cidrs[n] = c.kubectl(t, "get", "node", n.Name, "-o", "jsonpath={.spec.podCIDR}")
			return cidrs[n] != ""
		})
	}

	for _, n := range c.nodes {
		routes := forwardRules
		for _, other := range c.nodes {
			if other != n {
				routes += fmt.Sprintf("ip route replace %s via %s\n", cidrs[other], other.Address)
			}
		}

		n.WriteFile(t, "/etc/pod-routes.sh", routes, 0o644)
		n.WriteFile(t, "/etc/systemd/system/pod-routes.service", routesUnit, 0o644)
		n.Run(t, "systemctl", "daemon-reload")
		n.Run(t, "systemctl", "enable", "--now", "pod-routes.service")
		n.WriteFile(t, "/etc/cni/net.d/10-pods.conflist", fmt.Sprintf(bridgeConfig, cidrs[n]), 0o644)
	}
}

// podNetworkOf returns the network of the flag -cni.
func podNetworkOf(t *testing.T) podNetwork {
	t.Helper()
	n, ok := networks[*cni]
	if !ok {
		var known []string
		for name := range networks {
			known = append(known, name)
		}
		t.Fatalf("-cni=%s: use one of %s", *cni, strings.Join(known, ", "))
	}

	return n
}
