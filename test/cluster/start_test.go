package cluster

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
	"cri-dockerd/test/registry"
	"cri-dockerd/test/suite"
)

// startNode starts a node with the daemon and the requirements of kubeadm. mirror is a registry
// mirror for images of Docker Hub.
func (c *cluster) startNode(t *testing.T, w *nodes.Network, control bool, mirror string) *nodes.Node {
	t.Helper()
	config := nodes.Config{
		Network: w,
		Engine:  engine(),
		Binds:   map[string]string{},
		Files: map[string]string{
			"/etc/systemd/system/kubelet.service": read(t, "kubelet.service"),
			"/etc/docker/daemon.json": fmt.Sprintf(`{"exec-opts": ["native.cgroupdriver=systemd"], `+
				`"insecure-registries": [%q], "registry-mirrors": ["http://%s"], "live-restore": false}`,
				mirror, mirror),
		},
	}

	for _, b := range []string{"kubelet", "kubeadm", "kubectl"} {
		config.Binds["/usr/bin/"+b] = binary(t, b)
	}

	if c.network.configure != nil {
		c.network.configure(t, &config)
	}
	if c.suite != nil {
		suite.Configure(t, &config, c.suite.report, c.suite.authority, suiteSet, suiteProgram)
	}

	n := nodes.StartWithDaemon(t, config)
	n.Run(t, "systemctl", "enable", "kubelet.service")
	loadImages(t, n, control)
	if c.network.prepare != nil {
		c.network.prepare(t, n)
	}

	return n
}

// start creates the cluster and its pod network.
func start(t *testing.T) *cluster {
	t.Helper()
	c, w := &cluster{network: podNetworkOf(t)}, nodes.NewNetwork(t)
	var l net.Listener
	if err := engines.In(w.NetNS(), func() (err error) {
		l, err = net.Listen("tcp", nodes.Gateway+":5000")
		return err
	}); err != nil {
		t.Fatal(err)
	}

	hub := registry.Serve(t, l)
	if *focus != "" {
		c.suite = newSuite(t, w)
	}
	for i := range *size {
		c.nodes = append(c.nodes, c.startNode(t, w, i == 0, hub.Host))
		c.names += c.nodes[i].Name + "\n"
	}

	pushNginx(t, c.nodes[0], hub.Host)
	// the supported kernels and control groups are not a subject of this test
	const ignore = " --ignore-preflight-errors=SystemVerification"
	c.nodes[0].WriteFile(t, "/root/kubeadm.yaml",
		strings.ReplaceAll(read(t, "kubeadm.yaml"), "VERSION", engines.KubernetesVersion(t)), 0o600)
	c.sh(t, "kubeadm init --cri-socket unix:///var/run/cri-dockerd.sock --pod-network-cidr 10.244.0.0/16"+
		" --dry-run"+ignore)
	out := c.sh(t, "cd /root; kubeadm init --config kubeadm.yaml"+ignore+" "+strings.Join(c.network.kubeadmArgs, " "))
	if !strings.Contains(out, "Your Kubernetes control-plane has initialized successfully!") {
		t.Errorf("kubeadm init:\n%s", out)
	}

	t.Cleanup(func() { c.logState(t) })
	c.awaitNetworkMessage(t)
	if c.network.install != nil {
		c.network.install(t, c)
	}

	join := strings.TrimSpace(c.sh(t, "kubeadm token create --print-join-command"))
	for _, n := range c.nodes[1:] {
		n.Run(t, "sh", "-ec", join+" --cri-socket unix:///var/run/cri-dockerd.sock"+ignore)
	}

	if c.network.connect != nil {
		c.network.connect(t, c)
	}

	c.sh(t, "kubectl taint node node1 node-role.kubernetes.io/control-plane-")
	c.apply(t, "metrics-server.yaml")
	c.apply(t, "app.yaml")
	c.sh(t, "kubectl wait --for=condition=Ready node --all --timeout=180s")
	c.sh(t, "kubectl -n kube-system rollout status deployment/coredns --timeout=180s")
	c.kubectl(t, "rollout", "status", "daemonset/each", "--timeout", timeout.String())

	return c
}

// logState logs the state of the cluster after a failed test.
func (c *cluster) logState(t *testing.T) {
	if !t.Failed() {
		return
	}

	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"}, {"get", "events", "-A", "--field-selector=type=Warning"},
		{"-n", "kube-system", "logs", "deployment/metrics-server", "--tail=20"},
		{"get", "apiservice", "v1beta1.metrics.k8s.io"},
	} {
		out, err := c.nodes[0].Try("kubectl", append([]string{kubeconfig}, args...)...)
		t.Logf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// awaitNetworkMessage waits until the status of the node reports the missing pod network.
func (c *cluster) awaitNetworkMessage(t *testing.T) {
	t.Helper()
	c.nodes[0].Await(t, timeout, "message about the missing pod network", func() bool {
		return strings.Contains(c.sh(t, "kubectl describe node node1"), "install a network add-on such as flannel")
	})
}
