package conformance

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestExecProbes runs as many exec probes as a pod gets in hours. Each returns its own result, none
// leaves a process behind, and the memory of the daemon does not grow.
func TestExecProbes(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		probe := func(count int) {
			var g errgroup.Group
			g.SetLimit(8)
			for i := range count {
				g.Go(func() error {
					r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
						ContainerId: id,
						Cmd:         sh(fmt.Sprintf("echo %d; (sleep 0 &); exit %d", i, i%3)),
						Timeout:     60,
					})
					if err == nil && (string(r.Stdout) != fmt.Sprintln(i) || int(r.ExitCode) != i%3) {
						err = fmt.Errorf("probe %d: %v", i, r)
					}

					return err
				})
			}

			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
		}

		probe(200)
		before := n.Heap(t)
		probe(800)
		t.Logf("%d KiB before, %d KiB after", before>>10, n.Heap(t)>>10)
		if grown := n.Heap(t) - before; grown > 800<<10 { // 1 KiB for each
			t.Errorf("objects of the daemon grew by %d KiB in 800 probes", grown>>10)
		}
		// Orphans of a probe remain as zombies, because process 1 of the container, sleep, does not
		// reap them. The probe itself must not remain.
		if ps := n.exec(t, id, "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null"); strings.Contains(ps, "(sh) Z") {
			t.Errorf("probes remain as zombies:\n%s", ps)
		}
	})
}

// TestManyPodsAtOnce runs 50 pods with a container each in parallel and removes them.
func TestManyPodsAtOnce(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		const pods = 50
		var g errgroup.Group
		configs := make([]*runtimeapi.PodSandboxConfig, pods)
		ids, ips := make([]string, pods), make([]string, pods)
		for i := range configs {
			configs[i] = n.podConfig(t)
			g.Go(func() (err error) {
				ids[i], ips[i], err = n.runPodWithContainer(t, configs[i])
				return err
			})
		}

		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}

		seen := map[string]bool{}
		for i, ip := range ips {
			if ip == "" || seen[ip] {
				t.Errorf("pod %d has no IP address or that of another pod: %q", i, ip)
			}
			seen[ip] = true
		}

		l, err := n.Runtime.ListContainers(t.Context(),
			&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
				State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
			}})
		running := 0
		for _, c := range l.GetContainers() {
			if slices.Contains(ids, c.PodSandboxId) {
				running++
			}
		}

		if err != nil || running != pods {
			t.Errorf("%d containers run, want %d: %v", running, pods, err)
		}

		for i, id := range ids {
			g.Go(func() error {
				if i%2 == 0 { // half like the kubelet, half without a stop
					if _, err := n.Runtime.StopPodSandbox(t.Context(),
						&runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
						return err
					}
				}

				_, err := n.Runtime.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})

				return err
			})
		}

		if err := g.Wait(); err != nil {
			t.Error(err)
		}

		for _, cfg := range configs {
			n.assertNoLeftovers(t, cfg)
		}
	})
}

// runPodWithContainer runs a pod with a running container and returns its ID and IP address.
func (n *node) runPodWithContainer(t *testing.T, cfg *runtimeapi.PodSandboxConfig) (id, ip string, err error) {
	ctx := t.Context()
	r, err := n.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return "", "", err
	}

	c, err := n.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  r.PodSandboxId,
		Config:        n.containerConfig(sh("sleep 1000")),
		SandboxConfig: cfg,
	})
	if err != nil {
		return "", "", err
	}

	if _, err := n.Runtime.StartContainer(ctx,
		&runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return "", "", err
	}

	s, err := n.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: r.PodSandboxId})

	return r.PodSandboxId, s.GetStatus().GetNetwork().GetIp(), err
}

// TestParallelCallsOnOnePod makes every kind of call on one pod in parallel. With any result of the
// calls, the daemon must not hang, and the removal of the pod must leave nothing behind.
func TestParallelCallsOnOnePod(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		ctx := t.Context()
		cfg := n.podConfig(t)
		for range 3 {
			pod := n.runPod(t, cfg)
			var g errgroup.Group
			for i := range 8 {
				cc := n.containerConfig(sh("sleep 1000"))
				cc.Metadata.Name, cc.LogPath = fmt.Sprintf("c%d", i%4), "" // two callers for each name
				g.Go(func() error {
					c, err := n.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
						PodSandboxId:  pod,
						Config:        cc,
						SandboxConfig: cfg,
					})
					if err != nil {
						return nil //nolint:nilerr // another call may use the name or remove the pod
					}

					_, _ = n.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
					_, _ = n.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
						ContainerId: c.ContainerId,
						Cmd:         []string{"true"},
						Timeout:     5,
					})

					_, _ = n.Runtime.StopContainer(ctx,
						&runtimeapi.StopContainerRequest{ContainerId: c.ContainerId, Timeout: 1})
					_, _ = n.Runtime.RemoveContainer(ctx,
						&runtimeapi.RemoveContainerRequest{ContainerId: c.ContainerId})

					return nil
				})
			}

			g.Go(func() error {
				_, err := n.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
				return err
			})

			g.Go(func() error {
				_, err := n.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
				return err
			})

			if err := g.Wait(); err != nil {
				t.Error(err)
			}

			n.removePod(t, pod)
			n.assertNoLeftovers(t, cfg)
		}
	})
}
