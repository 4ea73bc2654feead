package conformance

import (
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestExecSyncWhileTheContainerEnds: a probe of a container that is being stopped is carried out,
// or fails with the code of the container's state, whichever part of the engine notices the end
// first.
func TestExecSyncWhileTheContainerEnds(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		const probes = 6
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for name, end := range map[string]func(id string) error{
			"stop": func(id string) error {
				_, err := n.Runtime.StopContainer(t.Context(),
					&runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 0})
				return err
			},
			"remove": func(id string) error {
				_, err := n.Runtime.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: id})
				return err
			},
		} {
			t.Run(name, func(t *testing.T) {
				cc := n.containerConfig(sh("sleep 1000"))
				cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
				id := n.startConfig(t, pod, cfg, cc)
				var group sync.WaitGroup
				for range probes {
					group.Go(func() { n.probeUntilTheEnd(t, id) })
				}

				time.Sleep(300 * time.Millisecond) // probes are under way; more or less of them is as good
				if err := end(id); err != nil {
					t.Error(err)
				}

				group.Wait()
			})
		}
	})
}

// probeUntilTheEnd runs a command until it is refused.
func (n *node) probeUntilTheEnd(t *testing.T, id string) {
	for {
		_, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: id,
			Cmd:         []string{"true"},
			Timeout:     60,
		})

		switch code := status.Code(err); code {
		case codes.OK: // whatever its exit code is: it may be killed with its container
		case codes.FailedPrecondition, codes.NotFound:
			return
		default:
			t.Errorf("ExecSync: %v", err)
			return
		}
	}
}
