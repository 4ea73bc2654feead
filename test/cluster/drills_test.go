package cluster

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"cri-dockerd/test/nodes"
)

// drill is a fault on one node, under load.
type drill struct {
	name  string
	fault func(t *testing.T, c *cluster, n *nodes.Node)
	end   func(t *testing.T, c *cluster, n *nodes.Node) // ends the fault; nil if the node heals by itself
	after func(t *testing.T, c *cluster, n *nodes.Node) // restores the node, also after a failure; may be nil
	bound time.Duration                                 // from the end of the fault until the node has healed

	// The pods of the node may notice the fault: requests fail, all containers restart, or new pods
	// replace them.
	interrupts bool
	restarts   bool
	replaces   bool
}

// kill returns a fault that kills the main process of a unit.
func kill(unit string) func(t *testing.T, c *cluster, n *nodes.Node) {
	return func(t *testing.T, _ *cluster, n *nodes.Node) {
		t.Helper()
		n.Run(t, "systemctl", "kill", "--kill-whom=main", "--signal=KILL", unit)
	}
}

// cutOff takes the node off the network until the control plane declares it unreachable.
func cutOff(t *testing.T, c *cluster, n *nodes.Node) {
	t.Helper()
	n.Disconnect(t)
	c.nodes[0].Await(t, timeout, "report of the unreachable node", func() bool {
		return c.jsonpath(t, `{.status.conditions[?(@.type=="Ready")].status}`, "node", n.Name) == "Unknown"
	})
}

// allDrills are the faults, from the least to the most severe. Bounds are about three times the
// usual duration.
var allDrills = []drill{
	{name: "daemon", fault: kill("cri-docker.service"), bound: 30 * time.Second},
	{name: "log-driver", fault: kill("cri-docker-log.service"), bound: 30 * time.Second},
	{name: "kubelet", fault: kill("kubelet.service"), bound: 30 * time.Second},
	{name: "containerd", fault: kill("containerd.service"), bound: 60 * time.Second},
	{name: "dockerd, live-restore", fault: kill("docker.service"), bound: 60 * time.Second},
	{
		name: "dockerd, no live-restore",
		fault: func(t *testing.T, c *cluster, n *nodes.Node) {
			setLiveRestore(t, n, false)
			kill("docker.service")(t, c, n)
		},
		after:      func(t *testing.T, _ *cluster, n *nodes.Node) { setLiveRestore(t, n, true) },
		bound:      2 * time.Minute,
		interrupts: true,
		restarts:   true,
	},
	{
		name:       "drain",
		fault:      func(t *testing.T, c *cluster, n *nodes.Node) { c.drain(t, n) },
		end:        func(t *testing.T, c *cluster, n *nodes.Node) { c.sh(t, "kubectl uncordon "+n.Name) },
		after:      func(t *testing.T, c *cluster, n *nodes.Node) { c.sh(t, "kubectl uncordon "+n.Name) },
		bound:      time.Minute,
		interrupts: true,
		replaces:   true,
	},
	{
		name:       "partition",
		fault:      cutOff,
		end:        func(t *testing.T, _ *cluster, n *nodes.Node) { n.Connect(t) },
		after:      func(t *testing.T, _ *cluster, n *nodes.Node) { n.Connect(t) },
		bound:      time.Minute,
		interrupts: true,
	},
	{
		name:       "reboot",
		fault:      func(t *testing.T, _ *cluster, n *nodes.Node) { n.Reboot(t, 3*time.Minute) },
		bound:      3 * time.Minute,
		interrupts: true,
		restarts:   true,
	},
	{
		name:       "power failure",
		fault:      func(t *testing.T, _ *cluster, n *nodes.Node) { n.Reset(t) },
		bound:      3 * time.Minute,
		interrupts: true,
		restarts:   true,
	},
}

// setLiveRestore changes the setting of a running engine.
func setLiveRestore(t *testing.T, n *nodes.Node, on bool) {
	t.Helper()
	n.Await(t, timeout, "engine", func() bool {
		_, err := n.Try("docker", "version")
		return err == nil
	})
	n.Run(t, "sed", "-i", fmt.Sprintf(`s/"live-restore": [a-z]*/"live-restore": %t/`, on), "/etc/docker/daemon.json")
	n.Run(t, "systemctl", "reload", "docker.service")
	n.Await(t, timeout, "live-restore setting", func() bool {
		return n.Run(t, "docker", "info", "-f", "{{.LiveRestoreEnabled}}") == fmt.Sprintln(on)
	})
}

// testDrills injects each fault on the last node and reports what its pods and a client on the
// first node noticed.
func (c *cluster) testDrills(t *testing.T) {
	if *size < 2 {
		t.Fatal("the drills need two nodes: NODES=3")
	}

	n := c.nodes[len(c.nodes)-1]
	setLiveRestore(t, n, true)
	manifest := strings.NewReplacer("NODE", n.Name, "IP", n.Address).Replace(read(t, "drills.yaml"))
	c.nodes[0].WriteFile(t, "/tmp/drills.yaml", manifest, 0o644)
	c.kubectl(t, "delete", "pod", "client", "--ignore-not-found", "--timeout", timeout.String())
	c.kubectl(t, "apply", "-f", "/tmp/drills.yaml")
	c.rollout(t, "deployment/victim")
	c.rollout(t, "deployment/other")
	c.kubectl(t, "wait", "--for=condition=Ready", "pod/client", "--timeout", timeout.String())

	report := fmt.Sprintf("ENGINE=%s CNI=%s NODES=%d\ndrill | healed after | failed requests (longest outage): "+
		"pod | service | node port | restarts | unready pods\n", engine(), *cni, *size)
	t.Cleanup(func() { t.Log("\n" + report) })
	for _, d := range allDrills {
		t.Run(d.name, func(t *testing.T) { report += c.run(t, n, d) })
	}
}
