package conformance

import (
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/lives"
)

// TestPodsLeaveNothingInTheDaemon: after some dozens of pods and as many readers of events the
// daemon holds no more descriptors and goroutines than before. What is kept for a next time
// (connections to the engine) is less than one for each pod. The benchmark "churn" does the same
// with 10,000 pods and looks at the memory, too.
func TestPodsLeaveNothingInTheDaemon(t *testing.T) {
	const pods, kept = 36, 12
	eachFresh(t, func(t *testing.T, n *node) {
		held := func() lives.Held {
			h, err := lives.ReadHeld(n.Metrics(t))
			if err != nil {
				t.Fatal(err)
			}
			return h
		}

		c := &lives.Churn{
			Runtime: n.Runtime,
			Pods:    8,
			AtOnce:  4,
			Pod:     func(int) *runtimeapi.PodSandboxConfig { return n.podConfig(t) },
			Container: func(_ string, command []string) *runtimeapi.ContainerConfig {
				return n.containerConfig(command)
			},
		}
		if _, err := c.Run(t.Context()); err != nil {
			t.Fatal(err)
		}

		before := held()
		c.Pods = pods
		t.Run("with readers", func(t *testing.T) { // who are gone when it ends
			for range pods {
				n.listen(t)
			}
			if _, err := c.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
		})

		var after lives.Held
		if !within(20*time.Second, func() bool {
			after = held()
			return after.Descriptors <= before.Descriptors+kept && after.Goroutines <= before.Goroutines+kept
		}) {
			t.Errorf("before %+v, after %d pods %+v", before, pods, after)
		}
	})
}
