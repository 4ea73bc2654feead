// Package cluster creates a cluster with kubeadm according to docs/kubeadm.md. Its nodes have the
// daemon from the package. The tests use services, DNS, streams and metrics like a user.
// hack/kubernetes.sh cluster builds the programs of the cluster.
package cluster

import (
	"embed"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
	"cri-dockerd/test/registry"
)

const (
	version    = "v1.36.3"
	kubeconfig = "--kubeconfig=/etc/kubernetes/admin.conf"
	timeout    = 3 * time.Minute // of operations with a duration of seconds on an idle machine
)

var size = flag.Int("nodes", 2, "number of nodes in the cluster; the first one is the control plane")

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
func binary(name string) string { return filepath.Join(engines.Cache(), "kubernetes-"+version, name) }

// cluster is a running cluster.
type cluster struct {
	nodes []*nodes.Node
	names string // of the nodes, one per line
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

// startNode starts a node with the daemon and the requirements of kubeadm. mirror is a registry
// mirror for images of Docker Hub.
func startNode(t *testing.T, w *nodes.Network, control bool, mirror string) *nodes.Node {
	t.Helper()
	c := nodes.Config{
		Network: w,
		Binds:   map[string]string{},
		Files: map[string]string{
			"/etc/systemd/system/kubelet.service": read(t, "kubelet.service"),
			"/etc/docker/daemon.json": fmt.Sprintf(`{"exec-opts": ["native.cgroupdriver=systemd"], `+
				`"insecure-registries": [%q], "registry-mirrors": ["http://%s"]}`, mirror, mirror),
		},
	}

	for _, b := range []string{"kubelet", "kubeadm", "kubectl"} {
		c.Binds["/usr/bin/"+b] = binary(b)
	}

	for _, p := range []string{"bridge", "host-local", "loopback", "portmap"} {
		c.Binds["/opt/cni/bin/"+p] = filepath.Join(engines.Plugins(), p)
	}

	n := nodes.StartWithDaemon(t, c)
	n.Run(t, "systemctl", "enable", "kubelet.service")
	loadImages(t, n, control)

	return n
}

// start creates the cluster and its pod network.
func start(t *testing.T) *cluster {
	t.Helper()
	if _, err := os.Stat(binary("kubeadm")); err != nil {
		t.Fatalf("Kubernetes is not built; run hack/kubernetes.sh kubelet cluster: %v", err)
	}

	c, w := &cluster{}, nodes.NewNetwork(t)
	var l net.Listener
	if err := engines.In(w.NetNS(), func() (err error) {
		l, err = net.Listen("tcp", nodes.Gateway+":5000")
		return err
	}); err != nil {
		t.Fatal(err)
	}

	hub := registry.Serve(t, l)
	for i := range *size {
		c.nodes = append(c.nodes, startNode(t, w, i == 0, hub.Host))
		c.names += c.nodes[i].Name + "\n"
	}

	pushNginx(t, c.nodes[0], hub.Host)
	// the supported kernels and control groups are not a subject of this test
	const ignore = " --ignore-preflight-errors=SystemVerification"
	c.nodes[0].WriteFile(t, "/root/kubeadm.yaml", read(t, "kubeadm.yaml"), 0o600)
	c.sh(t, "kubeadm init --cri-socket unix:///var/run/cri-dockerd.sock --pod-network-cidr 10.244.0.0/16"+
		" --dry-run"+ignore)
	out := c.sh(t, "cd /root; kubeadm init --config kubeadm.yaml"+ignore)
	if !strings.Contains(out, "Your Kubernetes control-plane has initialized successfully!") {
		t.Errorf("kubeadm init:\n%s", out)
	}

	t.Cleanup(func() { c.logState(t) })
	c.awaitNetworkMessage(t)
	c.apply(t, "flannel.yaml")
	join := strings.TrimSpace(c.sh(t, "kubeadm token create --print-join-command"))
	for _, n := range c.nodes[1:] {
		n.Run(t, "sh", "-ec", join+" --cri-socket unix:///var/run/cri-dockerd.sock"+ignore)
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

// TestCluster creates a cluster and uses it.
func TestCluster(t *testing.T) {
	c := start(t)
	pods := strings.Fields(c.kubectl(t, "get", "pod", "-l", "app=each", "-o", "jsonpath={.items[*].metadata.name}"))
	if len(pods) != *size {
		t.Fatalf("pods: %v", pods)
	}

	t.Run("nodes", c.testNodes)
	t.Run("first application", c.testApplication)
	t.Run("services", func(t *testing.T) { c.testServices(t, pods) })
	t.Run("streams", func(t *testing.T) {
		for _, p := range pods {
			c.testStreams(t, p)
		}
	})

	t.Run("port-forward", func(t *testing.T) { c.testPortForward(t, pods) })
	t.Run("debug", func(t *testing.T) { c.testDebug(t, pods[len(pods)-1]) })
	t.Run("top", func(t *testing.T) { c.testTop(t, pods) })
	if t.Failed() {
		return
	}

	t.Run("end", c.testEnd)
	t.Run("reset", c.testReset)
}

// testApplication runs the deployment from the documentation, with an image from a registry.
func (c *cluster) testApplication(t *testing.T) {
	c.sh(t, "kubectl create deployment web --image=nginx --replicas=3")
	c.sh(t, "kubectl expose deployment web --port=80")
	c.kubectl(t, "rollout", "status", "deployment/web", "--timeout", timeout.String())
	if out := c.sh(t, "kubectl get pods -o wide"); strings.Count(out, " 10.244.") != 3+*size {
		t.Errorf("addresses of pods:\n%s", out)
	}
	if out := c.sh(t, "curl http://$(kubectl get service web -o jsonpath='{.spec.clusterIP}')"); out != welcome {
		t.Errorf("page: %q", out)
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

// testServices connects to all pods through the service: from every pod by name, including the pod
// itself, and from every node by node port.
func (c *cluster) testServices(t *testing.T, pods []string) {
	for _, p := range pods {
		got := c.kubectl(t, "exec", p, "--", "sh", "-c",
			"for i in $(seq 40); do wget -q -O - http://each; done | sort -u")
		if got != c.names {
			t.Errorf("service from %s: got %q, want %q", p, got, c.names)
		}

		ip := c.kubectl(t, "get", "service", "each", "-o", "jsonpath={.spec.clusterIP}")
		got = c.kubectl(t, "exec", p, "--", "nslookup", "each.default.svc.cluster.local")
		if !strings.Contains(got, ip) {
			t.Errorf("DNS lookup from %s: no address %s in\n%s", p, ip, got)
		}
	}

	for _, from := range c.nodes {
		for _, to := range c.nodes {
			got := from.Run(t, "busybox", "wget", "-q", "-O", "-", "http://"+to.Address+":30080/")
			if !strings.Contains(c.names, got) {
				t.Errorf("node port of %s from %s: got %q", to.Name, from.Name, got)
			}
		}
	}
}

// testStreams uses logs, exec and cp.
func (c *cluster) testStreams(t *testing.T, pod string) {
	if got := c.kubectl(t, "logs", pod); !strings.HasPrefix(got, "serving on node") {
		t.Errorf("logs of %s: %q", pod, got)
	}

	sh := func(script string) string {
		t.Helper()
		return c.nodes[0].Run(t, "sh", "-c", "export KUBECONFIG=/etc/kubernetes/admin.conf; "+script, "sh", pod)
	}
	if got := sh(`head -c 10485760 /dev/zero | kubectl exec -i "$1" -- cat | wc -c`); got != "10485760\n" {
		t.Errorf("exec in %s: got %q of 10485760 bytes", pod, got)
	}
	if got := sh(`kubectl exec "$1" -- sh -c "exit 7" 2>/dev/null; echo $?`); got != "7\n" {
		t.Errorf("exit code of exec in %s: %q", pod, got)
	}

	if got := sh(`echo copied > /tmp/f && kubectl cp /tmp/f "$1":/tmp/f && kubectl cp "$1":/tmp/f /tmp/g && kubectl ` +
		`exec "$1" -- cat /tmp/f && cat /tmp/g`); !strings.HasSuffix(got, "copied\ncopied\n") {
		t.Errorf("cp to and from %s: %q", pod, got)
	}
}

// testPortForward uses port-forward to each pod.
func (c *cluster) testPortForward(t *testing.T, pods []string) {
	for i, p := range pods {
		port := fmt.Sprint(18080 + i)
		cmd := c.nodes[0].Command("kubectl", kubeconfig, "port-forward", "pod/"+p, port+":8080")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}

		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		node := c.kubectl(t, "get", "pod", p, "-o", "jsonpath={.spec.nodeName}")
		c.nodes[0].Await(t, timeout, "port-forward to "+p, func() bool {
			got, err := c.nodes[0].Try("busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:"+port+"/")
			return err == nil && got == node+"\n"
		})
	}
}

// testDebug lists the processes of a container from an ephemeral container.
func (c *cluster) testDebug(t *testing.T, pod string) {
	c.kubectl(t, "debug", pod, "--image="+engines.Busybox, "--image-pull-policy=Never", "--container=debugger",
		"--target=each", "--", "ps")
	c.nodes[0].Await(t, timeout, "output of the ephemeral container", func() bool {
		out, err := c.nodes[0].Try("kubectl", kubeconfig, "logs", pod, "-c", "debugger")
		return err == nil && strings.Contains(out, "httpd")
	})
}

// testTop checks the usage of nodes and pods from metrics-server. Each pod allocates 24 MB.
func (c *cluster) testTop(t *testing.T, pods []string) {
	// awaitUsage waits for a line for each name, with the memory in Mi in a column.
	awaitUsage := func(names []string, column int, least, most int, args ...string) {
		t.Helper()
		args = append(append([]string{kubeconfig, "top"}, args...), "--no-headers")
		c.nodes[0].Await(t, timeout, strings.Join(args, " "), func() bool {
			out, err := c.nodes[0].Try("kubectl", args...)
			var got []string
			for line := range strings.Lines(out) {
				if f := strings.Fields(line); len(f) > column && isWithin(f[column], least, most) {
					got = append(got, f[0])
				}
			}

			slices.Sort(got)

			return err == nil && slices.Equal(got, slices.Sorted(slices.Values(names)))
		})
	}

	awaitUsage(strings.Fields(c.names), 3, 100, 1<<20, "node")
	awaitUsage(pods, 2, 19, 40, "pod", "-l", "app=each")
	t.Log("\n" + c.kubectl(t, "top", "node") + c.kubectl(t, "top", "pod", "-A"))
}

// isWithin reports whether a quantity in Mi is between least and most.
func isWithin(quantity string, least, most int) bool {
	n, err := strconv.Atoi(strings.TrimSuffix(quantity, "Mi"))
	return err == nil && least <= n && n <= most
}

// testEnd deletes the pods and waits for the removal of their containers.
func (c *cluster) testEnd(t *testing.T) {
	c.kubectl(t, "delete", "daemonset/each", "deployment/web", "--timeout", timeout.String(), "--cascade=foreground")
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
