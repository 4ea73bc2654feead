package conformance

import (
	"slices"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/podstats"
)

// conditions are the conditions of metrics that hold for a container of
// TestEveryDescriptorHasMetrics. The others depend on the machine.
func conditions(hasLimits bool) []string {
	all := []string{"", "for pods with a network of their own"}
	if hasLimits {
		all = append(all, "with a CPU quota", "with CPU shares")
	}
	return all
}

// TestEveryDescriptorHasMetrics checks that every running container has each metric with a
// descriptor, itself or by its pod or node, unless the condition of the metric does not hold. One
// container has a log path and limits, the other has neither.
func TestEveryDescriptorHasMetrics(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		d, err := n.Runtime.ListMetricDescriptors(t.Context(), &runtimeapi.ListMetricDescriptorsRequest{})
		if err != nil {
			t.Fatal(err)
		}

		described := map[string]bool{}
		for _, x := range d.Descriptors {
			described[x.Name] = true
		}

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		limited := n.containerConfig(sh("sleep 1000"))
		limited.Linux.Resources = &runtimeapi.LinuxContainerResources{
			CpuShares: 512,
			CpuQuota:  50000,
			CpuPeriod: 100000,
		}
		plain := n.containerConfig(sh("sleep 1000"))
		plain.Metadata.Name, plain.LogPath = "plain", ""

		for name, cc := range map[string]*runtimeapi.ContainerConfig{"limited": limited, "plain": plain} {
			t.Run(name, func(t *testing.T) {
				id := n.startConfig(t, pod, cfg, cc)
				has := map[string]bool{}
				for _, m := range slices.Concat(n.metrics(t, pod, id), n.metrics(t, pod, ""), n.nodeMetrics(t)) {
					has[m.Name] = true
					if !described[m.Name] {
						t.Errorf("metric %s has no descriptor", m.Name)
					}
				}

				tested := 0
				for x := range podstats.Descriptors() {
					if !slices.Contains(conditions(name == "limited"), x.When) {
						continue
					}
					tested++
					if !described[x.Name] || !has[x.Name] {
						t.Errorf("metric %s: described %v, present %v", x.Name, described[x.Name], has[x.Name])
					}
				}

				if tested < 40 {
					t.Errorf("only %d metrics were tested", tested)
				}
			})
		}
	})
}
