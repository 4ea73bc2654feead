package cluster

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// policy is a network policy in the namespace "policy" and its effect. friend and stranger are the
// protocols over which these reach the server.
type policy struct {
	kind             string
	name             string
	spec             string
	friend, stranger string
}

const (
	both    = "tcp udp"
	nothing = ""
)

// policies allow and deny, at the server (ingress) and at the clients (egress).
var policies = []policy{
	{
		kind:   "NetworkPolicy",
		name:   "deny-ingress",
		spec:   `{podSelector: {matchLabels: {role: server}}, policyTypes: [Ingress]}`,
		friend: nothing, stranger: nothing,
	},
	{
		kind: "NetworkPolicy",
		name: "allow-ingress",
		spec: `{podSelector: {matchLabels: {role: server}}, policyTypes: [Ingress], ingress: [{
			from: [{podSelector: {matchLabels: {role: friend}}}], ports: [{protocol: TCP, port: 8080}]}]}`,
		friend: "tcp", stranger: nothing,
	},
	{
		kind:   "NetworkPolicy",
		name:   "deny-egress",
		spec:   `{podSelector: {matchLabels: {role: stranger}}, policyTypes: [Egress]}`,
		friend: both, stranger: nothing,
	},
	{
		kind: "NetworkPolicy",
		name: "allow-egress",
		spec: `{podSelector: {matchLabels: {role: stranger}}, policyTypes: [Egress], egress: [{
			to: [{podSelector: {matchLabels: {role: server}}}], ports: [{protocol: UDP, port: 8080}]}]}`,
		friend: both, stranger: "udp",
	},
	{
		kind: "CiliumNetworkPolicy",
		name: "allow-ingress",
		spec: `{endpointSelector: {matchLabels: {role: server}}, ingress: [{
			fromEndpoints: [{matchLabels: {role: friend}}], toPorts: [{ports: [{port: "8080", protocol: UDP}]}]}]}`,
		friend: "udp", stranger: nothing,
	},
	{
		kind: "CiliumNetworkPolicy",
		name: "deny-ingress",
		spec: `{endpointSelector: {matchLabels: {role: server}}, ingress: [{fromEntities: [all]}], ingressDeny: [{
			fromEndpoints: [{matchLabels: {role: stranger}}], toPorts: [{ports: [{port: "8080", protocol: TCP}]}]}]}`,
		friend: both, stranger: "udp",
	},
	{
		kind: "CiliumNetworkPolicy",
		name: "allow-egress",
		spec: `{endpointSelector: {matchLabels: {role: friend}}, egress: [{
			toEndpoints: [{matchLabels: {role: server}}], toPorts: [{ports: [{port: "8080", protocol: TCP}]}]}]}`,
		friend: "tcp", stranger: both,
	},
	{
		kind: "CiliumNetworkPolicy",
		name: "deny-egress",
		spec: `{endpointSelector: {matchLabels: {role: stranger}}, egress: [{toEntities: [all]}], egressDeny: [{
			toEndpoints: [{matchLabels: {role: server}}]}]}`,
		friend: both, stranger: nothing,
	},
}

// manifest returns the policy for kubectl.
func (p policy) manifest() string {
	version := "networking.k8s.io/v1"
	if p.kind == "CiliumNetworkPolicy" {
		version = "cilium.io/v2"
	}

	return fmt.Sprintf("{apiVersion: %s, kind: %s, metadata: {name: %s, namespace: policy}, spec: %s}\n",
		version, p.kind, p.name, strings.ReplaceAll(p.spec, "\t", ""))
}

// applyPolicy creates the policy.
func (c *cluster) applyPolicy(t *testing.T, p policy) {
	t.Helper()
	c.nodes[0].WriteFile(t, "/tmp/one.yaml", p.manifest(), 0o644)
	c.kubectl(t, "apply", "-f", "/tmp/one.yaml")
}

// policyPods are the pods under policies.
type policyPods struct {
	cluster            *cluster
	server             string // address
	friends, strangers []podRef
}

// runPolicyPods starts the pods.
func (c *cluster) runPolicyPods(t *testing.T) *policyPods {
	t.Helper()
	last := c.nodes[len(c.nodes)-1].Name
	c.nodes[0].WriteFile(t, "/tmp/policy.yaml",
		strings.ReplaceAll(read(t, "cilium-policy.yaml"), "LAST", last), 0o644)
	c.kubectl(t, "apply", "-f", "/tmp/policy.yaml")
	for _, name := range []string{"deployment/server", "daemonset/friend", "daemonset/stranger"} {
		c.kubectl(t, "rollout", "status", name, "-n", "policy", "--timeout", timeout.String())
	}

	return c.policyPods(t)
}

// policyPods returns the current pods, which have other names and addresses after a restart of
// Docker.
func (c *cluster) policyPods(t *testing.T) *policyPods {
	t.Helper()
	p := &policyPods{
		cluster:   c,
		friends:   c.pods(t, "policy", "role=friend"),
		strangers: c.pods(t, "policy", "role=stranger"),
	}
	servers := c.pods(t, "policy", "role=server")
	if len(servers) != 1 || len(p.friends) != *size || len(p.strangers) != *size {
		t.Fatalf("pods under policies: got servers %v, %v, %v", servers, p.friends, p.strangers)
	}

	p.server = servers[0].ip

	return p
}

// reach returns the protocols over which a pod reaches the server, and other words if it failed to
// ask.
func (p *policyPods) reach(from podRef) string {
	out, err := p.cluster.podProber("policy", from).ask("tcp://"+p.server+":8080", "udp://"+p.server+":8080")
	if err != nil {
		return err.Error()
	}

	var reached []string
	for target, answer := range answers(out) {
		if strings.HasPrefix(answer, "server-") {
			reached = append(reached, target[:3])
		}
	}

	slices.Sort(reached)

	return strings.Join(reached, " ")
}

// check returns the pods that reach something else than wanted.
func (p *policyPods) check(friend, stranger string) []string {
	problems := make(chan string)
	ask := func(from podRef, want string) {
		problem := ""
		if got := p.reach(from); got != want {
			problem = fmt.Sprintf("%s on %s reaches %q, want %q", from.name, from.node, got, want)
		}
		problems <- problem
	}

	for i := range p.friends {
		go ask(p.friends[i], friend)
		go ask(p.strangers[i], stranger)
	}

	var found []string
	for range 2 * len(p.friends) {
		if problem := <-problems; problem != "" {
			found = append(found, problem)
		}
	}

	return found
}

// require waits for the effect of a policy, and then requires it to stay.
func (p *policyPods) require(t *testing.T, what, friend, stranger string) {
	t.Helper()
	for end := time.Now().Add(settleTimeout); ; time.Sleep(time.Second) {
		problems := p.check(friend, stranger)
		if len(problems) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s: after %s:\n%s", what, settleTimeout, strings.Join(problems, "\n"))
		}
	}

	if problems := p.check(friend, stranger); len(problems) > 0 {
		t.Fatalf("%s: again:\n%s", what, strings.Join(problems, "\n"))
	}
}

// testPolicies applies each policy alone.
func (ci *cilium) testPolicies(t *testing.T, c *cluster) {
	pods := c.runPolicyPods(t)
	pods.require(t, "without a policy", both, both)
	for _, p := range policies {
		t.Run(p.kind+" "+p.name, func(t *testing.T) {
			c.applyPolicy(t, p)
			pods.require(t, "with the policy", p.friend, p.stranger)
			c.kubectl(t, "delete", "-f", "/tmp/one.yaml")
			pods.require(t, "after its removal", both, both)
		})
	}
}
