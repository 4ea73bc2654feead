package conformance

import (
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/lifecycle"
)

// TestPodsLeaveNothingInTheDaemon runs some dozens of pods and as many event streams. Afterwards
// the daemon holds no more descriptors and goroutines than before, except for pooled connections to
// the engine, fewer than one per pod. The benchmark "churn" does the same with 10,000 pods and also
// measures memory.
func TestPodsLeaveNothingInTheDaemon(t *testing.T) {
	const pods, pooled = 36, 12
	eachFresh(t, func(t *testing.T, n *node) {
		held := func() lifecycle.Usage {
			h, err := lifecycle.ReadUsage(n.Metrics(t))
			if err != nil {
				t.Fatal(err)
			}
			return h
		}

		c := &lifecycle.Churn{
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
		t.Run("with event streams", func(t *testing.T) { // its end closes the streams
			for range pods {
				n.recordEvents(t)
			}
			if _, err := c.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
		})

		var after lifecycle.Usage
		if !within(20*time.Second, func() bool {
			after = held()
			return after.Descriptors <= before.Descriptors+pooled && after.Goroutines <= before.Goroutines+pooled
		}) {
			t.Errorf("resources before: %+v, after %d pods: %+v", before, pods, after)
		}
	})
}
