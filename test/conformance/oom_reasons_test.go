package conformance

import (
	"context"
	"flag"
	"fmt"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var oomKills = flag.Int("oom-kills", 12, "containers that exceed their memory limit in TestOOMReasons")

// oomShapes are ways to run out of memory that end the container. The kernel kills the main
// process, or a child whose exit code the main process passes on.
var oomShapes = []struct{ name, script string }{
	{"main", exhaustMemory},
	{"child", "(" + exhaustMemory + "); exit $?"},
	{"late", "sleep 1; " + exhaustMemory},
}

// TestOOMReasons exceeds the memory limits of many containers, several at once. Engines report only
// some of these kills, most of all with cgroup v2.
func TestOOMReasons(t *testing.T) {
	const workers = 4

	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		numbers := make(chan int)
		go func() {
			defer close(numbers)
			for i := range *oomKills {
				numbers <- i
			}
		}()

		var wg sync.WaitGroup
		for range workers {
			wg.Go(func() {
				for i := range numbers {
					if err := n.killByOOM(t.Context(), pod, cfg, i); err != nil {
						t.Errorf("kill %d (%s): %v", i, oomShapes[i%len(oomShapes)].name, err)
					}
				}
			})
		}

		wg.Wait()
	})
}

// killByOOM runs a container that exceeds its memory limit, and returns an error if its status is
// not that of an OOM kill.
func (n *node) killByOOM(ctx context.Context, pod string, cfg *runtimeapi.PodSandboxConfig, i int) error {
	cc := n.containerConfig(sh(oomShapes[i%len(oomShapes)].script))
	cc.Metadata.Name, cc.LogPath = fmt.Sprint("oom", i), fmt.Sprintf("oom%d.log", i)
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}
	c, err := n.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  pod,
		Config:        cc,
		SandboxConfig: cfg,
	})
	if err != nil {
		return err
	}

	_, err = n.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
	if err != nil {
		return err
	}

	var s *runtimeapi.ContainerStatus
	exited := within(2*time.Minute, func() bool {
		r, e := n.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ContainerId})
		s, err = r.GetStatus(), e
		return e != nil || s.State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	if err != nil {
		return err
	}

	if !exited || s.Reason != "OOMKilled" || s.ExitCode != 137 {
		return fmt.Errorf("%v, reason %q and exit code %d, want OOMKilled and 137", s.State, s.Reason, s.ExitCode)
	}

	_, err = n.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ContainerId})

	return err
}
