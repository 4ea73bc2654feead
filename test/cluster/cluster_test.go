// Package cluster creates a cluster with kubeadm according to docs/kubeadm.md. Its nodes have the
// daemon from the package. The tests use services, DNS, streams and metrics like a user.
// hack/kubernetes.sh cluster builds the programs of the cluster.
package cluster

import (
	"embed"
	"flag"
	"strings"
	"testing"
	"time"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

const (
	kubeconfig = "--kubeconfig=/etc/kubernetes/admin.conf"
	timeout    = 3 * time.Minute // of operations with a duration of seconds on an idle machine
)

var (
	size   = flag.Int("nodes", 2, "number of nodes in the cluster; the first one is the control plane")
	cni    = flag.String("cni", "flannel", "pod network: flannel, bridge, cilium or cilium-no-kube-proxy")
	full   = flag.Bool("full", false, "run all checks")
	drills = flag.Bool("drills", false, "inject faults instead of the checks")
	focus  = flag.String("focus", "", "run tests of Kubernetes' suite with these names instead, a regular expression")
)

// engine returns the version of Docker Engine: the one in the environment variable ENGINE, else
// 20.10.
func engine() engines.Version { return engines.Versions()[0] }

//go:embed testdata
var testdata embed.FS

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := testdata.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// binary returns the path of a program from hack/kubernetes.sh.
func binary(t *testing.T, name string) string {
	t.Helper()
	set := "cluster"
	if name == "kubelet" {
		set = name
	}

	return engines.KubernetesProgram(t, set, name)
}

// cluster is a running cluster.
type cluster struct {
	network podNetwork
	nodes   []*nodes.Node
	names   string           // of the nodes, one per line
	suite   *kubernetesSuite // nil without -focus
}

// sh runs a command from the documentation on the control plane.
func (c *cluster) sh(t *testing.T, command string) string {
	t.Helper()
	return c.nodes[0].Run(t, "sh", "-ec", "export KUBECONFIG=/etc/kubernetes/admin.conf\n"+command)
}

// kubectl runs kubectl on the control plane.
func (c *cluster) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	return c.nodes[0].Run(t, "kubectl", append([]string{kubeconfig}, args...)...)
}

// apply applies a manifest from testdata.
func (c *cluster) apply(t *testing.T, name string) {
	t.Helper()
	c.nodes[0].WriteFile(t, "/tmp/"+name, read(t, name), 0o644)
	c.kubectl(t, "apply", "-f", "/tmp/"+name)
}

// TestCluster creates a cluster and uses it. With -drills it injects faults instead; with -full it
// runs all checks, and the drills after them. With -focus it runs Kubernetes' own tests.
func TestCluster(t *testing.T) {
	c := start(t)
	if *focus != "" {
		c.testSuite(t)
		return
	}

	if !*drills || *full {
		c.testAll(t)
	}
	if *drills {
		t.Run("drills", c.testDrills)
	}
	if t.Failed() {
		return
	}

	t.Run("end", c.testEnd)
	t.Run("reset", c.testReset)
}

// testAll runs the checks.
func (c *cluster) testAll(t *testing.T) {
	pods := strings.Fields(c.jsonpath(t, "{.items[*].metadata.name}", "pod", "-l", "app=each"))
	if len(pods) != *size {
		t.Fatalf("pods: %v", pods)
	}

	t.Run("nodes", c.testNodes)
	t.Run("first application", c.testApplication)
	t.Run("services", func(t *testing.T) { c.testServices(t, pods) })
	t.Run("streams", func(t *testing.T) { c.testStreams(t, pods) })
	t.Run("top", func(t *testing.T) { c.testTop(t, pods) })
	t.Run("agents in pods", c.testAgents)
	if *full {
		t.Run("workloads", c.testWorkloads)
		t.Run("shop", c.testShop)
	}
	if *full && *size > 1 {
		t.Run("drain", c.testDrain)
	}
	if c.network.test != nil {
		t.Run("network", func(t *testing.T) { c.network.test(t, c) })
	}
}

// testApplication runs the deployment from the documentation, with an image from a registry.
func (c *cluster) testApplication(t *testing.T) {
	c.sh(t, "kubectl create deployment web --image=nginx --replicas=3")
	c.sh(t, "kubectl expose deployment web --port=80")
	c.kubectl(t, "rollout", "status", "deployment/web", "--timeout", timeout.String())
	if out := c.sh(t, "kubectl get pods -o wide"); strings.Count(out, " "+c.network.addresses) != 3+*size {
		t.Errorf("addresses of pods:\n%s", out)
	}
	if out := c.sh(t, "curl http://$(kubectl get service web -o jsonpath='{.spec.clusterIP}')"); out != welcome {
		t.Errorf("page: %q", out)
	}

	c.sh(t, "kubectl expose deployment web --name=web-outside --type=NodePort --port=80")
	port := c.sh(t, "kubectl get service web-outside -o jsonpath='{.spec.ports[0].nodePort}'")
	for _, n := range c.nodes {
		n.Await(t, timeout, "page at the node port", func() bool { // the proxy follows after a moment
			out, err := c.nodes[0].Try("curl", "-sS", "http://"+n.Address+":"+port)
			return err == nil && out == welcome
		})
	}

	if out := c.sh(t, "kubectl logs deployment/web"); out != "started\n" {
		t.Errorf("logs: %q", out)
	}
	if out := c.sh(t, "kubectl exec deployment/web -- hostname"); !strings.HasPrefix(out, "web-") {
		t.Errorf("hostname: %q", out)
	}

	out := c.sh(t, "kubectl get nodes -o custom-columns=NAME:.metadata.name,CIDR:.spec.podCIDR")
	if strings.Count(out, " 10.244.") != *size {
		t.Errorf("pod CIDRs of the nodes:\n%s", out)
	}
}

// testNodes checks the container runtime in the status of the nodes, and the units of the daemon.
func (c *cluster) testNodes(t *testing.T) {
	out := c.sh(t, "kubectl get nodes -o wide")
	for _, n := range c.nodes {
		engine := strings.TrimSpace(n.Run(t, "docker", "version", "-f", "{{.Server.Version}}"))
		if strings.Count(out, " docker://"+engine) != *size || strings.Contains(out, "NotReady") {
			t.Errorf("nodes:\n%s", out)
		}

		got := n.Run(t, "systemctl", "is-active", "cri-docker.socket", "cri-docker.service", "cri-docker-log.socket",
			"cri-docker-log.service")
		if got != "active\nactive\nactive\nactive\n" {
			t.Errorf("units of %s: got %q", n.Name, got)
		}
	}
}

// testEnd deletes the pods and waits for the removal of their containers.
func (c *cluster) testEnd(t *testing.T) {
	c.kubectl(t, "delete", "daemonset,deployment,statefulset,job,pod", "--all", "--timeout", timeout.String(),
		"--cascade=foreground")
	for _, n := range c.nodes {
		n.Await(t, timeout, "removal of the deleted pods", func() bool {
			return n.Run(t, "docker", "ps", "-aq", "--filter", "label=io.kubernetes.pod.namespace=default") == ""
		})
	}
}

// testReset resets the last node. This removes all its pods.
func (c *cluster) testReset(t *testing.T) {
	n := c.nodes[len(c.nodes)-1]
	n.Run(t, "sh", "-ec", "kubeadm reset --force --cri-socket unix:///var/run/cri-dockerd.sock")
	if out := n.Run(t, "docker", "ps", "-a"); strings.Contains(out, "k8s_") {
		t.Errorf("containers on %s after the reset:\n%s", n.Name, out)
	}
}
