package conformance

import (
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestExecSyncWhileTheContainerEnds probes a container during its stop or removal. Each probe runs
// or fails with the code for the container's state, regardless of the engine component that notices
// the exit first.
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
					group.Go(func() { n.probeUntilRefused(t, id) })
				}

				time.Sleep(300 * time.Millisecond) // some probes run; their number does not matter
				if err := end(id); err != nil {
					t.Error(err)
				}

				group.Wait()
			})
		}
	})
}

// probeUntilRefused runs a command until the daemon refuses it.
func (n *node) probeUntilRefused(t *testing.T, id string) {
	for {
		_, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: id,
			Cmd:         []string{"true"},
			Timeout:     60,
		})

		switch code := status.Code(err); code {
		case codes.OK: // with any exit code: the command may be killed with its container
		case codes.FailedPrecondition, codes.NotFound:
			return
		default:
			t.Errorf("ExecSync: %v", err)
			return
		}
	}
}
