package conformance

import (
	"os"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// assertLimits reads the limits of a container from the kernel.
func (n *node) assertLimits(t *testing.T, when, id, pids, reservation string) {
	t.Helper()
	if got := strings.TrimSpace(n.readCgroup(t, id, "pids/pids.max", "pids.max")); got != pids {
		t.Errorf("%s: process limit %s, want %s", when, got, pids)
	}
	got := strings.TrimSpace(n.readCgroup(t, id, "memory/memory.soft_limit_in_bytes", "memory.low"))
	if got != reservation {
		t.Errorf("%s: memory reservation %s, want %s", when, got, reservation)
	}
}

// TestNRIResourcesBeyondCRI sets resources that Docker has and the CRI does not have: at the
// creation, in the response to an update, and by the plugin itself. Others fail by name.
func TestNRIResourcesBeyondCRI(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		a := &api.ContainerAdjustment{}
		a.SetLinuxPidLimits(71)
		a.SetLinuxMemoryReservation(11 << 20)

		update := func(id string, pids, reservation int64) *api.ContainerUpdate {
			u := &api.ContainerUpdate{ContainerId: id}
			u.SetLinuxPidLimits(pids)
			u.SetLinuxMemoryReservation(reservation)
			return u
		}
		p := newPlugin(10, "beyond")
		p.onCreate = func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
			return a, nil, nil
		}
		p.onUpdate = func(c *api.Container, _ *api.LinuxResources) ([]*api.ContainerUpdate, error) {
			return []*api.ContainerUpdate{update(c.GetId(), 72, 12<<20)}, nil
		}
		p.connect(t, n)

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		n.assertLimits(t, "after the start", c, "71", "11534336")

		if _, err := n.Runtime.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: c,
			Linux:       &runtimeapi.LinuxContainerResources{CpuShares: 300},
		}); err != nil {
			t.Errorf("UpdateContainerResources: %v", err)
		}
		n.assertLimits(t, "after an update", c, "72", "12582912")

		if failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{update(c, 73, 13<<20)}); err != nil ||
			len(failed) > 0 {
			t.Errorf("update by the plugin itself: %v, %v", failed, err)
		}
		n.assertLimits(t, "after an update by the plugin itself", c, "73", "13631488")

		swappiness := &api.ContainerUpdate{ContainerId: c}
		swappiness.SetLinuxMemorySwappiness(7)
		p.onUpdate = func(*api.Container, *api.LinuxResources) ([]*api.ContainerUpdate, error) {
			return []*api.ContainerUpdate{swappiness}, nil
		}
		_, err := n.Runtime.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: c,
			Linux:       &runtimeapi.LinuxContainerResources{CpuShares: 300},
		})
		if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "swappiness") {
			t.Errorf("error %v, want Unimplemented for swappiness", err)
		}
	})
}

// TestNRIRDTClass sets an RDT class. Without resctrl the start fails, and the reason reaches the
// caller.
func TestNRIRDTClass(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		a := &api.ContainerAdjustment{}
		a.SetLinuxRDTClass("gold")
		n.adjusting(t, a)

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		created, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
			PodSandboxId:  pod,
			Config:        n.containerConfig(sh("sleep 1000")),
			SandboxConfig: cfg,
		})
		if !n.usesShim(t, pod) {
			if status.Code(err) != codes.FailedPrecondition ||
				!strings.Contains(err.Error(), "RDT class (by plugin 10-") {
				t.Errorf("error %v, want FailedPrecondition for the RDT class", err)
			}
			return
		}

		if err != nil {
			t.Fatal(err)
		}

		_, err = n.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
			ContainerId: created.ContainerId,
		})
		_, statErr := os.Stat("/sys/fs/resctrl/schemata")
		if (err == nil) != (statErr == nil) || err != nil && !strings.Contains(err.Error(), "resctrl") {
			t.Errorf("error %v; resctrl on this node: %v", err, statErr)
		}
	})
}
