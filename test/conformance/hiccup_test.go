package conformance

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestTransientFailureIsNotPermanent has an engine that fails to start one pod. The engine creates
// the network namespaces of this pod and the next ones. After a reconnect to the engine, the daemon
// creates namespaces again.
func TestTransientFailureIsNotPermanent(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := n.newProxy(t)
		n = n.withDaemon(t, "--docker-endpoint=unix://"+p.socket)
		p.fail("/start")
		first := n.runPod(t, n.podConfig(t))
		n.assertNetNSMode(t, first, "engine")
		if c := n.netnsCondition(t); c.Status || c.Reason != "CreatedByEngine" || c.Message == "" {
			t.Errorf("condition after the failure: %v, want reason CreatedByEngine", c)
		}

		second := n.podConfig(t)
		n.assertNetNSMode(t, n.runPod(t, second), "engine")

		n.own(t).Stop(t)
		n.own(t).Restart(t)
		eventually(t, "RuntimeReady", func() bool { ready, _ := n.runtimeReady(t); return ready })
		var id string
		eventually(t, "a pod with a namespace of the daemon", func() bool { // after the start of recovery
			cfg := n.podConfig(t)
			id = n.runPod(t, cfg)
			return n.inspect(t, id, ".HostConfig.NetworkMode") == "host"
		})

		n.assertNetNSMode(t, id, "own")
		if c := n.netnsCondition(t); !c.Status || c.Reason != "CreatedByDaemon" {
			t.Errorf("condition after the reconnect: %v, want reason CreatedByDaemon", c)
		}

		if s := n.podStatus(t, first); s.State != runtimeapi.PodSandboxState_SANDBOX_READY ||
			!strings.HasPrefix(s.Network.GetIp(), "10.88.") {
			t.Errorf("status of the first pod: %v", s)
		}
	})
}
