package conformance

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestHiccupSettlesNothing: an engine that fails to start the first pod once makes its network
// namespace, and those of the next pods. When the daemon has connected to the engine anew,
// namespaces are ours again.
func TestHiccupSettlesNothing(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := n.newProxy(t)
		n = n.withDaemon(t, "--docker-endpoint=unix://"+p.socket)
		p.fail("/start")
		first := n.runPod(t, n.podConfig(t))
		n.madeBy(t, first, "engine")
		if c := n.netnsCondition(t); c.Status || c.Reason != "Engine" || c.Message == "" {
			t.Errorf("condition: %v", c)
		}

		second := n.podConfig(t)
		n.madeBy(t, n.runPod(t, second), "engine")

		n.own(t).Stop(t)
		n.own(t).Restart(t)
		eventually(t, "RuntimeReady", func() bool { ready, _ := n.runtimeReady(t); return ready })
		var id string
		eventually(t, "a pod with a namespace of ours", func() bool { // as soon as recovery has begun
			cfg := n.podConfig(t)
			id = n.runPod(t, cfg)
			return n.inspect(t, id, ".HostConfig.NetworkMode") == "host"
		})

		n.madeBy(t, id, "own")
		if c := n.netnsCondition(t); !c.Status || c.Reason != "Own" {
			t.Errorf("condition: %v", c)
		}

		if s := n.podStatus(t, first); s.State != runtimeapi.PodSandboxState_SANDBOX_READY ||
			!strings.HasPrefix(s.Network.GetIp(), "10.88.") {
			t.Errorf("the first pod: %v", s)
		}
	})
}
