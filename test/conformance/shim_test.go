package conformance

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var parentPid = regexp.MustCompile(`(?m)^PPid:\s*(\d+)$`)

// shim returns the PID of a container's shim, the parent of its main process.
func (n *node) shim(t *testing.T, id string) string {
	t.Helper()
	pid := strings.TrimSpace(n.docker(t, "inspect", "-f", "{{.State.Pid}}", id))
	m := parentPid.FindStringSubmatch(n.run(t, "cat", "/proc/"+pid+"/status"))
	if m == nil {
		t.Fatalf("no parent of process %s", pid)
	}
	return m[1]
}

// TestOneShimPerPod checks that all containers of a pod share one shim on API 1.43 and newer. Exit
// codes, exec, kill, removal in any order, and a restart of the engine still work.
func TestOneShimPerPod(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		ids := make([]string, 10)
		shims := map[string]bool{n.shim(t, pod): true}
		for i := range ids {
			ids[i] = n.startNamed(t, pod, cfg, fmt.Sprintf("c%d", i),
				sh(fmt.Sprintf("trap 'exit %d' TERM; while true; do sleep 0.05; done", 20+i)))
			shims[n.shim(t, ids[i])] = true
		}

		want := 1
		if !n.own(t).HasAPI(t, "1.43") {
			want = 11
		}
		if len(shims) != want {
			t.Errorf("pod with ten containers has %d shims, want %d", len(shims), want)
		}

		n.eng.Kill(t)
		n.eng.Restart(t)
		eventually(t, "list of the containers after the restart", func() bool {
			r, err := n.Runtime.ListContainers(t.Context(),
				&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: pod}})
			return err == nil && len(r.Containers) == len(ids)
		})

		for i, id := range ids {
			n.exec(t, id, "true")
			n.stop(t, id, 10)
			if s := n.containerStatus(t, id); s.ExitCode != int32(20+i) {
				t.Errorf("status of container %d: %v, want exit code %d", i, s, 20+i)
			}

			if i%2 == 0 {
				if _, err := n.Runtime.RemoveContainer(t.Context(),
					&runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
					t.Errorf("RemoveContainer: %v", err)
				}
			}
		}

		again := n.startNamed(t, pod, cfg, "late", sh("sleep 1000"))
		n.docker(t, "rm", "-f", pod) // the pause, first container of the shim
		n.stop(t, again, 0)
		if s := n.containerStatus(t, again); s.ExitCode != 137 {
			t.Errorf("status of a container killed after the removal of its pause: %v", s)
		}

		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
		eventually(t, "exit of all shims", func() bool {
			return !strings.Contains(n.run(t, "ps", "ax"), "containerd-shim")
		})
	})
}
