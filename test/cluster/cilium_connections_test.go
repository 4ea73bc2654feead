package cluster

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// podRef is a pod of the tests.
type podRef struct{ name, ip, node string }

// pods returns the pods with a label, ordered by node.
func (c *cluster) pods(t *testing.T, namespace, label string) []podRef {
	t.Helper()
	out := c.kubectl(t, "get", "pod", "-n", namespace, "-l", label, "--field-selector=status.phase=Running", "-o",
		`jsonpath={range .items[*]}{.metadata.name} {.status.podIP} {.spec.nodeName}{"\n"}{end}`)
	var pods []podRef
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 3 {
			t.Fatalf("pod of %s: got %q, want name, address and node", label, line)
		}
		pods = append(pods, podRef{f[0], f[1], f[2]})
	}

	slices.SortFunc(pods, func(a, b podRef) int { return strings.Compare(a.node, b.node) })

	return pods
}

// prober asks targets from one place and returns the output of probe.
type prober struct {
	name string
	ask  func(targets ...string) (string, error)
}

func (c *cluster) podProber(namespace string, p podRef) prober {
	return prober{p.name, func(targets ...string) (string, error) {
		args := []string{kubeconfig, "exec", "-n", namespace, p.name, "--", "probe", "ask"}
		return c.nodes[0].Try("kubectl", append(args, targets...)...)
	}}
}

// hostProbers ask from the nodes, and from the network of the nodes.
func (ci *cilium) hostProbers(c *cluster) []prober {
	var all []prober
	for _, n := range c.nodes {
		all = append(all, prober{n.Name, func(targets ...string) (string, error) {
			return n.Try("probe", append([]string{"ask"}, targets...)...)
		}})
	}

	return append(all, prober{"outside", func(targets ...string) (string, error) {
		args := append([]string{"--net=" + ci.outside.NetNS(), ci.probe, "ask"}, targets...)
		out, err := exec.Command("nsenter", args...).Output()
		return string(out), err
	}})
}

// answers parses the output of probe into answers by target.
func answers(out string) map[string]string {
	found := map[string]string{}
	for line := range strings.Lines(out) {
		target, answer, _ := strings.Cut(strings.TrimSpace(line), " ")
		found[target] = answer
	}

	return found
}

// expectation has the names of possible servers by target.
type expectation map[string][]string

// add expects an answer over TCP and UDP.
func (e expectation) add(hostPort string, servers ...string) {
	for _, protocol := range []string{"tcp://", "udp://"} {
		e[protocol+hostPort] = servers
	}
}

// check asks all targets and returns the wrong answers.
func (e expectation) check(p prober) []string {
	targets := make([]string, 0, len(e))
	for t := range e {
		targets = append(targets, t)
	}

	slices.Sort(targets)
	out, err := p.ask(targets...)
	if err != nil {
		return []string{fmt.Sprintf("%s: %v", p.name, err)}
	}

	var wrong []string
	got := answers(out)
	for _, t := range targets {
		if !slices.Contains(e[t], got[t]) {
			wrong = append(wrong, fmt.Sprintf("%s to %s: got %q, want one of %q", p.name, t, got[t], e[t]))
		}
	}

	return wrong
}

// checkAll checks what each prober expects, all at once.
func checkAll(wanted map[*prober]expectation) []string {
	var mu sync.Mutex
	var wrong []string
	var wg sync.WaitGroup
	for p, e := range wanted {
		wg.Go(func() {
			w := e.check(*p)
			mu.Lock()
			defer mu.Unlock()
			wrong = append(wrong, w...)
		})
	}

	wg.Wait()
	slices.Sort(wrong)

	return wrong
}

// settleTimeout is for agents to apply a change on all nodes.
const settleTimeout = time.Minute

// requireConnections waits until all connections work, and then requires them to work again.
func requireConnections(t *testing.T, what string, wanted map[*prober]expectation) {
	t.Helper()
	var wrong []string
	for end := time.Now().Add(settleTimeout); ; time.Sleep(time.Second) {
		if wrong = checkAll(wanted); len(wrong) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %d failures after %s:\n%s", what, len(wrong), settleTimeout, strings.Join(wrong, "\n"))
		}
	}

	for range 2 {
		if wrong = checkAll(wanted); len(wrong) > 0 {
			t.Fatalf("%s: %d failures after a success:\n%s", what, len(wrong), strings.Join(wrong, "\n"))
		}
	}
}

// testConnections connects all pods and nodes with all pods by address, with the service by name,
// address and node port, and with host ports. From outside it uses node ports and host ports.
func (ci *cilium) testConnections(t *testing.T, c *cluster) {
	c.apply(t, "cilium-probe.yaml")
	for _, name := range []string{"server", "client", "engine"} {
		c.kubectl(t, "rollout", "status", "daemonset/"+name, "--timeout", timeout.String())
	}

	servers := c.pods(t, "default", "app=server")
	all := slices.Concat(servers, c.pods(t, "default", "app=client"), c.pods(t, "default", "app=engine"))
	if len(servers) != *size || len(all) != 3**size {
		t.Fatalf("got pods %v, want three on each node", all)
	}

	ci.checkNamespaces(t, c, all)
	requireConnections(t, "connections", ci.connections(t, c, servers, all))
}

// connections returns what each prober must reach.
func (ci *cilium) connections(t *testing.T, c *cluster, servers, all []podRef) map[*prober]expectation {
	t.Helper()
	var names []string
	for _, p := range servers {
		names = append(names, p.name)
	}

	outside := expectation{}
	for i, n := range c.nodes {
		outside.add(n.Address+":30090", names...)
		outside.add(n.Address+":18080", servers[i].name)
	}

	inside := expectation{}
	inside.add(c.kubectl(t, "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}")+":80", names...)
	for _, p := range all {
		inside.add(p.ip+":8080", p.name)
	}
	for target, servers := range outside {
		inside[target] = servers
	}

	inPods := expectation{}
	inPods.add("server.default.svc.cluster.local:80", names...)
	for target, servers := range inside {
		inPods[target] = servers
	}

	wanted := map[*prober]expectation{}
	for _, p := range all {
		pr := c.podProber("default", p)
		wanted[&pr] = inPods
	}

	for _, p := range ci.hostProbers(c) {
		wanted[&p] = inside
		if p.name == "outside" {
			wanted[&p] = outside
		}
	}

	return wanted
}

// checkNamespaces checks that the engine created the network namespaces of the pods named engine
// only.
func (*cilium) checkNamespaces(t *testing.T, c *cluster, all []podRef) {
	t.Helper()
	for _, n := range c.nodes {
		for _, p := range all {
			if p.node != n.Name {
				continue
			}

			got := n.Run(t, "docker", "ps", "-q", "--filter", "label=io.kubernetes.pod.name="+p.name,
				"--filter", "volume=/netns") // the mount of the namespace
			if engines := strings.HasPrefix(p.name, "engine-"); engines != (got == "") {
				t.Errorf("%s: pause with a namespace of the daemon: %q", p.name, got)
			}
		}
	}
}

// testConnectedSocket deletes the server to which a UDP socket is connected through a service. One
// client is in a network namespace of the daemon, one in a namespace of the engine. Both must
// reach another server soon. They do not replace a silent socket of their own accord.
func (ci *cilium) testConnectedSocket(t *testing.T, c *cluster) {
	c.apply(t, "cilium-udp.yaml")
	c.kubectl(t, "rollout", "status", "deployment/udp", "--timeout", timeout.String())
	for _, client := range []string{"udp-own", "udp-engine"} {
		c.kubectl(t, "wait", "--for=condition=Ready", "pod/"+client, "--timeout", timeout.String())
		lastAnswer := func() string {
			lines := strings.Split(strings.TrimSpace(c.kubectl(t, "logs", client)), "\n")
			last := lines[len(lines)-1]
			if strings.HasPrefix(last, "error: ") {
				return ""
			}
			return last
		}

		server := ""
		c.nodes[0].Await(t, settleTimeout, "answer to "+client, func() bool {
			server = lastAnswer()
			return server != ""
		})

		c.kubectl(t, "delete", "pod", server)
		deleted := time.Now()
		c.nodes[0].Await(t, settleTimeout, "answer of another server to "+client, func() bool {
			last := lastAnswer()
			return last != "" && last != server
		})
		t.Logf("%s: %s after the removal:\n%s", client, time.Since(deleted), c.kubectl(t, "logs", client))
	}
}
