package cluster

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

// duringRestarts allows the traffic of friends only.
var duringRestarts = policy{
	kind: "NetworkPolicy",
	name: "restarts",
	spec: `{podSelector: {matchLabels: {role: server}}, policyTypes: [Ingress], ingress: [{
		from: [{podSelector: {matchLabels: {traffic: friend}}}, {podSelector: {matchLabels: {role: friend}}}],
		ports: [{protocol: TCP, port: 8080}]}]}`,
	friend: "tcp", stranger: nothing,
}

// testRestarts restarts the agents and the daemons under traffic that must not notice it, and then
// Docker on the last node, which ends the pods there.
func (ci *cilium) testRestarts(t *testing.T, c *cluster) {
	pods := c.runPolicyPods(t)
	c.applyPolicy(t, duringRestarts)
	pods.require(t, "before the restarts", duringRestarts.friend, duringRestarts.stranger)
	c.apply(t, "cilium-traffic.yaml")
	c.kubectl(t, "wait", "--for=condition=Ready", "pod", "-n", "policy", "-l", "traffic", "--timeout", timeout.String())
	c.awaitTraffic(t)

	for _, step := range []struct {
		name string
		do   func(t *testing.T, c *cluster)
	}{
		{"agents", ci.restartAgents},
		{"killed agents", ci.killAgents},
		{"daemons", restartDaemons},
	} {
		t.Run(step.name, func(t *testing.T) {
			step.do(t, c)
			c.checkNewPods(t)
			c.checkTraffic(t)
		})
	}

	t.Run("Docker", func(t *testing.T) {
		ci.restartDocker(t, c)
		c.checkNewPods(t)
		c.awaitTraffic(t)
		ci.checkEndpoints(t, c)
	})
}

// trafficLog returns the lines of a traffic pod, from the start of its container.
func (c *cluster) trafficLog(t *testing.T, pod string) []string {
	t.Helper()
	return strings.Split(strings.TrimSpace(c.kubectl(t, "logs", "-n", "policy", pod)), "\n")
}

// awaitTraffic waits until the friends reach the server. The stranger must not.
func (c *cluster) awaitTraffic(t *testing.T) {
	t.Helper()
	answers := map[string]string{"friend-new": "ok", "friend-held": "server-", "stranger-new": "error: "}
	for pod, answer := range answers {
		c.nodes[0].Await(t, settleTimeout, "traffic of "+pod, func() bool {
			lines := c.trafficLog(t, pod)
			return strings.HasPrefix(lines[len(lines)-1], answer)
		})
	}

	c.checkStranger(t)
}

func (c *cluster) checkStranger(t *testing.T) {
	t.Helper()
	if lines := c.trafficLog(t, "stranger-new"); slices.Contains(lines, "ok") {
		t.Errorf("the stranger reached the server:\n%s", strings.Join(lines, "\n"))
	}
}

// checkTraffic checks that the traffic since the start of its pods had no error.
func (c *cluster) checkTraffic(t *testing.T) {
	t.Helper()
	c.checkStranger(t)
	for _, pod := range []string{"friend-new", "friend-held"} {
		if lines := c.trafficLog(t, pod); len(lines) != 1 || strings.HasPrefix(lines[0], "error: ") {
			t.Errorf("traffic of %s was disturbed:\n%s", pod, strings.Join(lines, "\n"))
		}
	}

	restarts := c.kubectl(t, "get", "pod", "-n", "policy", "-l", "traffic", "-o",
		"jsonpath={.items[*].status.containerStatuses[*].restartCount}")
	if restarts != "0 0 0" {
		t.Errorf("restarts of the traffic's containers: %s", restarts)
	}
}

// checkNewPods replaces pods and checks the policy with the new ones.
func (c *cluster) checkNewPods(t *testing.T) {
	t.Helper()
	for _, name := range []string{"daemonset/friend", "daemonset/stranger"} {
		c.kubectl(t, "rollout", "restart", name, "-n", "policy")
	}
	for _, name := range []string{"daemonset/friend", "daemonset/stranger", "deployment/server"} {
		c.kubectl(t, "rollout", "status", name, "-n", "policy", "--timeout", timeout.String())
	}

	c.nodes[0].Await(t, timeout, "end of the replaced pods", func() bool {
		return len(c.pods(t, "policy", "role")) == 1+2**size
	})
	c.policyPods(t).require(t, "new pods", duringRestarts.friend, duringRestarts.stranger)
}

// restartAgents replaces the pods of all agents.
func (ci *cilium) restartAgents(t *testing.T, c *cluster) {
	c.kubectl(t, "rollout", "restart", "daemonset/cilium", "-n", "kube-system")
	ci.awaitAgents(t, c)
}

// killAgents kills the agents' processes. The kubelets restart their containers.
func (ci *cilium) killAgents(t *testing.T, c *cluster) {
	restarts := func() string {
		return c.kubectl(t, "get", "pod", "-n", "kube-system", "-l", "k8s-app=cilium", "-o",
			"jsonpath={.items[*].status.containerStatuses[?(@.name=='cilium-agent')].restartCount}")
	}

	before := restarts()
	for _, n := range c.nodes {
		n.Run(t, "sh", "-ec", "kill -9 $(pidof cilium-agent)")
	}

	c.nodes[0].Await(t, timeout, "restart of all agents", func() bool {
		now := strings.Fields(restarts())
		for i, count := range strings.Fields(before) {
			if i >= len(now) || now[i] == count {
				return false
			}
		}
		return true
	})
	ci.awaitAgents(t, c)
}

// restartDaemons restarts the daemon on all nodes.
func restartDaemons(t *testing.T, c *cluster) {
	for _, n := range c.nodes {
		n.Run(t, "systemctl", "restart", "cri-docker.service")
	}
}

// restartDocker restarts Docker on the last node without live-restore. The agent, the server and
// the other pods of the node start again.
func (ci *cilium) restartDocker(t *testing.T, c *cluster) {
	n := c.nodes[len(c.nodes)-1]
	const agent = "label=io.kubernetes.container.name=cilium-agent"
	id := n.Run(t, "docker", "ps", "-q", "--filter", agent)
	n.Run(t, "systemctl", "restart", "docker.service")
	n.Await(t, timeout, "a new agent", func() bool {
		out, err := n.Try("docker", "ps", "-q", "--filter", agent)
		return err == nil && out != "" && out != id
	})

	c.nodes[0].Await(t, timeout, "the API server", func() bool {
		_, err := c.nodes[0].Try("kubectl", kubeconfig, "get", "--raw", "/readyz")
		return err == nil
	})
	ci.awaitAgents(t, c)
}

// checkEndpoints waits until each agent has the node's running pods as its endpoints, and no
// others: those of former network namespaces were released.
func (*cilium) checkEndpoints(t *testing.T, c *cluster) {
	t.Helper()
	for _, n := range c.nodes {
		var got, want []string
		defer func() {
			if t.Failed() {
				t.Logf("%s: endpoints %q, pods %q", n.Name, got, want)
			}
		}()

		agent := c.kubectl(t, "get", "pod", "-n", "kube-system", "-l", "k8s-app=cilium",
			"--field-selector=spec.nodeName="+n.Name, "-o", "jsonpath={.items[0].metadata.name}")
		n.Await(t, timeout, "endpoints of the agent", func() bool {
			got = parseEndpoints(t, c.kubectl(t, "exec", "-n", "kube-system", agent, "-c", "cilium-agent", "--",
				"cilium-dbg", "endpoint", "list", "-o", "json"))
			want = c.podAddresses(t, n)
			slices.Sort(got)

			return slices.Equal(got, want)
		})
	}
}

// parseEndpoints returns the addresses of pods in the agent's list of endpoints. The node and the
// agent's own endpoint for health checks were not attached by the plugin.
func parseEndpoints(t *testing.T, list string) (addresses []string) {
	t.Helper()
	var endpoints []struct {
		Status struct {
			ID struct {
				Attachment string `json:"cni-attachment-id"`
			} `json:"external-identifiers"`
			Networking struct {
				Addressing []struct{ IPv4 string }
			}
		}
	}
	if err := json.Unmarshal([]byte(list), &endpoints); err != nil {
		t.Fatalf("endpoints of the agent: %v\n%s", err, list)
	}

	for _, e := range endpoints {
		if e.Status.ID.Attachment == "" {
			continue
		}
		for _, a := range e.Status.Networking.Addressing {
			addresses = append(addresses, a.IPv4)
		}
	}

	return addresses
}
