package cluster

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// resources prints what a node has of pods, in sorted lines.
const resources = `{
	docker ps -a --filter label=io.kubernetes.docker.type --format 'containers of {{.Label "io.kubernetes.pod.name"}}' |
		sort -u
	for f in /var/run/netns/cni-*; do [ ! -e "$f" ] || echo namespace; done
	for f in /run/cri-dockerd/netns/*; do [ ! -e "$f" ] && [ ! -L "$f" ] || echo pin; done
	for f in /var/lib/cni/networks/*/[0-9]*.*; do [ ! -e "$f" ] || echo "address ${f##*/}"; done
	ip -o link show master cni0 2>/dev/null | sed 's/.*/port of cni0/'
} | sort`

// drain evicts the pods of a node and checks that nothing remains of them.
func (c *cluster) drain(t *testing.T, n *nodes.Node) {
	t.Helper()
	c.sh(t, "kubectl drain "+n.Name+" --ignore-daemonsets --delete-emptydir-data --timeout=180s")
	owners := c.jsonpath(t, "{range .items[*]}{.metadata.ownerReferences[0].kind} {.metadata.name}\n{end}", "pod", "-A",
		"--field-selector=status.phase=Running,spec.nodeName="+n.Name)
	for line := range strings.Lines(owners) {
		if !strings.HasPrefix(line, "DaemonSet ") {
			t.Errorf("pod on the drained node %s: %s", n.Name, line)
		}
	}

	// The kubelet removes ended containers and sandboxes once a minute.
	var got, want []string
	if !engines.Within(timeout, func() bool {
		got, want = strings.Split(strings.TrimSpace(n.Run(t, "sh", "-ec", resources)), "\n"), c.expectedResources(t, n)
		return slices.Equal(got, want)
	}) {
		t.Errorf("resources of pods on the drained node %s:\ngot  %q\nwant %q", n.Name, got, want)
	}
}

// expectedResources returns the output of resources for the pods of a node in the API.
func (c *cluster) expectedResources(t *testing.T, n *nodes.Node) []string {
	t.Helper()
	var want []string
	pods := c.jsonpath(t, "{range .items[*]}{.metadata.name} {.status.podIP}\n{end}", "pod", "-A",
		"--field-selector=spec.nodeName="+n.Name)
	for line := range strings.Lines(pods) {
		name, address, _ := strings.Cut(strings.TrimSpace(line), " ")
		want = append(want, "containers of "+name)
		if address == n.Address {
			continue
		}

		want = append(want, "namespace", "pin")
		if c.network.hostLocal {
			want = append(want, "address "+address, "port of cni0")
		}
	}

	slices.Sort(want)

	return want
}

// testDrain drains a node and returns it to service.
func (c *cluster) testDrain(t *testing.T) {
	n := c.nodes[1]
	c.drain(t, n)
	c.rollout(t, "deployment/web")
	c.sh(t, "kubectl uncordon "+n.Name)
	c.sh(t, "kubectl scale deployment web --replicas="+fmt.Sprint(3*len(c.nodes)))
	c.rollout(t, "deployment/web")
	if c.jsonpath(t, "{.items[*].metadata.name}", "pod", "-l", "app=web",
		"--field-selector=spec.nodeName="+n.Name) == "" {
		t.Errorf("no pod of the deployment on %s after uncordon", n.Name)
	}
}
