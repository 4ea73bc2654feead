package cluster

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// ciliumVersion is the version of test/cilium/go.mod.
const ciliumVersion = "v1.20.2"

// ciliumFile returns the path of a file from hack/cilium.sh.
func ciliumFile(name string) string {
	return filepath.Join(engines.Cache(), "cilium-"+ciliumVersion, name)
}

// cilium is a cluster with Cilium. Its programs, chart and images come from Cilium's Go module.
type cilium struct {
	values        string // file in testdata, as on the page for users
	replacesProxy bool

	outside *nodes.Network
	machine machine  // before the first node
	groups  []string // control groups of the nodes
	probe   string   // program of test/cluster/probe
	agent   *image   // of the agent's pods
}

// newCilium returns the pod network Cilium. addresses is the prefix of the addresses of its pods.
func newCilium(values, addresses string, replacesProxy bool) podNetwork {
	ci := &cilium{values: values, replacesProxy: replacesProxy}
	n := podNetwork{
		addresses: addresses,
		configure: ci.configure,
		prepare:   ci.prepare,
		install:   ci.install,
		test:      ci.test,
	}
	if replacesProxy {
		n.kubeadmArgs = []string{"--skip-phases=addon/kube-proxy"}
	}

	return n
}

// configure adds Helm, the chart, and the plugins that a distribution's package has.
func (ci *cilium) configure(t *testing.T, c *nodes.Config) {
	t.Helper()
	if _, err := os.Stat(ciliumFile("stamp")); err != nil {
		t.Fatalf("Cilium is not built; run hack/cilium.sh: %v", err)
	}

	if ci.probe == "" { // the first node
		ci.outside = c.Network
		ci.machine = inspectMachine(t)
		t.Cleanup(func() { ci.testMachine(t) }) // when all nodes are removed
		ci.probe = filepath.Join(t.TempDir(), "probe")
		engines.Build(t, ci.probe, "cri-dockerd/test/cluster/probe", "", false)
	}

	standardPlugins(t, c)
	c.Binds["/usr/local/bin/probe"] = ci.probe
	c.Binds["/usr/local/bin/helm"] = ciliumFile("bin/helm")
	c.Binds["/root/chart"] = ciliumFile("chart")
}

// shielded are the sysctls of the whole machine that an agent writes, with the values.
var shielded = map[string]string{"unprivileged_bpf_disabled": "1", "timer_migration": "0"}

// prepare hides the machine's sysctls from the agent, and creates the images.
func (ci *cilium) prepare(t *testing.T, n *nodes.Node) {
	t.Helper()
	ci.groups = append(ci.groups, groupOf(t, n))
	for name := range shielded {
		n.Run(t, "sh", "-ec", `mkdir -p /run/shield; cat "/proc/sys/kernel/$1" > "/run/shield/$1"
			mount --bind "/run/shield/$1" "/proc/sys/kernel/$1"`, "sh", name)
	}

	if ci.agent == nil {
		ci.agent = agentImage(t)
	}

	const path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	socket := n.Path("/run/docker.sock")
	engines.Import(t, socket, "cri-test/cilium:latest", ci.agent.files, path, `CMD ["/usr/bin/cilium-dbg"]`)

	operator := newImage(t)
	operator.add("/usr/bin/cilium-operator-generic", ciliumFile("bin/cilium-operator-generic"))
	engines.Import(t, socket, "cri-test/cilium-operator:latest", operator.files, path)

	tester := newImage(t)
	tester.busybox()
	tester.add("/usr/bin/probe", ci.probe)
	engines.Import(t, socket, "cri-test/probe:latest", tester.files, path)
}

// install installs the chart with the values of the page for users and those of the test.
func (ci *cilium) install(t *testing.T, c *cluster) {
	t.Helper()
	c.nodes[0].WriteFile(t, "/root/values.yaml", read(t, ci.values), 0o644)
	c.nodes[0].WriteFile(t, "/root/test.yaml", read(t, "cilium-test.yaml"), 0o644)
	c.sh(t, "cd /root; helm install cilium ./chart --namespace kube-system --values values.yaml --values test.yaml")
}

// test runs the tests of the network.
func (ci *cilium) test(t *testing.T, c *cluster) {
	ci.awaitAgents(t, c)
	t.Run("connections", func(t *testing.T) { ci.testConnections(t, c) })
	t.Run("connected UDP socket", func(t *testing.T) { ci.testConnectedSocket(t, c) })
	t.Run("policies", func(t *testing.T) { ci.testPolicies(t, c) })
	t.Run("restarts", func(t *testing.T) { ci.testRestarts(t, c) })
	t.Run("shield", func(t *testing.T) { ci.testShield(t, c) })
}

// awaitAgents waits until the agents run their current version, and the nodes and DNS are ready.
func (*cilium) awaitAgents(t *testing.T, c *cluster) {
	t.Helper()
	c.sh(t, "kubectl -n kube-system rollout status daemonset/cilium --timeout=180s")
	c.sh(t, "kubectl -n kube-system rollout status deployment/cilium-operator --timeout=180s")
	c.sh(t, "kubectl wait --for=condition=Ready node --all --timeout=180s")
	c.sh(t, "kubectl -n kube-system rollout status deployment/coredns --timeout=180s")
}

// agentImage collects the programs that the agent's pods run: the agent, the compiler of its
// programs with their sources, tools of the host, and the scripts of Cilium's image.
func agentImage(t *testing.T) *image {
	t.Helper()
	i := newImage(t).iptables()
	for _, kind := range []string{"nft", "legacy"} {
		multi := "/usr/sbin/xtables-" + kind + "-multi"
		i.linked(multi, multi)
		for _, n := range []string{"iptables", "ip6tables"} {
			for _, suffix := range []string{"", "-save", "-restore"} {
				i.link("/usr/sbin/"+n+"-"+kind+suffix, filepath.Base(multi))
			}
		}
	}

	for _, name := range []string{"bash", "nsenter", "mount", "umount", "ip", "tc", "ipset"} {
		file, err := exec.LookPath(name)
		if err != nil {
			t.Fatalf("image of the agent: %v", err)
		}
		i.linked("/usr/bin/"+name, file)
	}

	i.link("/bin/bash", "/usr/bin/bash") // for the scripts

	// clang finds its libraries and headers beside itself.
	const clang = "/usr/lib/llvm-19/bin/clang"
	i.linked(clang, clang)
	i.link("/usr/bin/clang", clang)
	i.tree("/var/lib/cilium/bpf", ciliumFile("bpf"))

	for _, name := range []string{
		"cilium-agent", "cilium-dbg", "cilium-health", "cilium-health-responder", "cilium-mount", "cilium-sysctlfix",
	} {
		i.add("/usr/bin/"+name, ciliumFile("bin/"+name))
	}

	i.link("/usr/bin/cilium", "cilium-dbg")
	i.add("/opt/cni/bin/cilium-cni", ciliumFile("bin/cilium-cni"))
	i.add("/cni/loopback", filepath.Join(engines.Plugins(), "loopback"))
	for _, name := range []string{"init-container.sh", "install-plugin.sh", "cni-uninstall.sh"} {
		i.add("/"+name, ciliumFile("scripts/"+name))
	}

	return i
}

// tree adds a directory of the host.
func (i *image) tree(name, dir string) {
	i.t.Helper()
	err := filepath.WalkDir(dir, func(file string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			i.add(name+strings.TrimPrefix(file, dir), file)
		}
		return err
	})
	if err != nil {
		i.t.Fatalf("image: %v", err)
	}
}
