package cluster

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// listNamespaces prints the addresses of eth0 in each network namespace in a directory.
const listNamespaces = `for f in "$1"/cni-*; do
	echo $f $(nsenter --net=$f ip -o -4 addr show eth0 | grep -o 'inet [0-9.]*')
done`

// agentRoots has the agents: the directory below which each sees the host's /var/run/netns.
var agentRoots = map[string]string{"agent": "", "agent-host": "/host"}

// testAgents runs the agents of network add-ons on each node. They must see, open and configure the
// network namespaces of older and newer pods, and not see those of removed pods.
func (c *cluster) testAgents(t *testing.T) {
	c.apply(t, "agent.yaml")
	for app, root := range agentRoots {
		c.kubectl(t, "-n", "kube-system", "rollout", "status", "daemonset/"+app, "--timeout", timeout.String())
		for _, n := range c.nodes {
			agent := c.jsonpath(t, "{.items[0].metadata.name}", "pod", "-n", "kube-system", "-l", "app="+app,
				"--field-selector=spec.nodeName="+n.Name)
			t.Run(app+" on "+n.Name, func(t *testing.T) { c.testAgent(t, n, agent, root+"/var/run/netns") })
		}
	}
}

// testAgent uses the agent of a node, which sees the namespaces in dir.
func (c *cluster) testAgent(t *testing.T, n *nodes.Node, agent, dir string) {
	inAgent := func(args ...string) string {
		t.Helper()
		return c.kubectl(t, append([]string{"-n", "kube-system", "exec", agent, "--"}, args...)...)
	}

	pod := "for-agent-" + n.Name
	c.kubectl(t, "run", pod, "--image="+engines.Busybox, "--image-pull-policy=Never", "--overrides",
		`{"spec": {"nodeName": "`+n.Name+`", "terminationGracePeriodSeconds": 1}}`, "--", "sleep", "1000")
	c.kubectl(t, "wait", "--for=condition=Ready", "pod/"+pod, "--timeout", timeout.String())
	var got map[string]string
	var addresses, want []string
	if !engines.Within(timeout, func() bool { // pods of earlier tests may be terminating
		want = c.podAddresses(t, n)
		got = namespaces(inAgent("sh", "-c", listNamespaces, "sh", dir))
		addresses = slices.Sorted(maps.Keys(got))
		return slices.Equal(addresses, want)
	}) {
		t.Errorf("the agent sees namespaces with addresses %q, want those of the pods: %q", addresses, want)
	}

	ip := c.kubectl(t, "get", "pod", pod, "-o", "jsonpath={.status.podIP}")
	file := got[ip]
	inAgent("nsenter", "--net="+file, "ip", "addr", "add", "192.0.2.7/32", "dev", "eth0")
	if out := c.kubectl(t, "exec", pod, "--", "ip", "addr"); !strings.Contains(out, "192.0.2.7/32") {
		t.Errorf("the pod does not have the address from the agent:\n%s", out)
	}

	c.kubectl(t, "delete", "pod", pod, "--timeout", timeout.String())
	n.Await(t, timeout, "removal of the pod's namespace from the agent's view", func() bool {
		return !strings.Contains(inAgent("ls", dir), strings.TrimPrefix(file, dir+"/"))
	})
}

// podAddresses returns the addresses of a node's running pods with a network of their own, sorted.
func (c *cluster) podAddresses(t *testing.T, n *nodes.Node) []string {
	t.Helper()
	out := c.kubectl(t, "get", "pod", "-A", "--field-selector=status.phase=Running,spec.nodeName="+n.Name, "-o",
		"jsonpath={.items[*].status.podIP}")
	all := strings.Fields(out)
	slices.Sort(all)

	return slices.DeleteFunc(all, func(a string) bool { return a == n.Address })
}

// namespaces parses the output of listNamespaces into files by address.
func namespaces(out string) map[string]string {
	files := map[string]string{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 {
			files[f[2]] = f[0]
		}
	}

	return files
}
