package conformance

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sandboxPID returns the pause's PID from the daemon.
func (n *node) sandboxPID(t *testing.T, id string) string {
	t.Helper()
	r, err := n.Runtime.PodSandboxStatus(t.Context(),
		&runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}

	var info struct{ PID int }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		t.Fatal(err)
	}

	return fmt.Sprint(info.PID)
}

// assertReplaced checks that a pod with a restarted pause is NotReady, accepts no containers, and
// is replaced by the next RunPodSandbox.
func (n *node) assertReplaced(t *testing.T, id string, cfg *runtimeapi.PodSandboxConfig) {
	t.Helper()
	isUpdated := func() bool { return n.sandboxPID(t, id) == n.inspect(t, id, ".State.Pid") }
	eventually(t, "PID of the restarted pause", isUpdated)
	if got := n.podStatus(t, id).State; got != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("pod is %v, want NotReady", got)
	}
	if err := n.createErr(t, id, cfg, n.containerConfig(sh("true"))); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("CreateContainer: %v, want FailedPrecondition", err)
	}

	replacement := n.runPod(t, cfg)
	if replacement == id || n.podStatus(t, replacement).State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("RunPodSandbox of the same pod returned %s, want a new sandbox instead of %s", replacement, id)
	}

	n.removePod(t, replacement)
	n.assertNoLeftovers(t, cfg)
}

// TestRestartedPause restarts pauses of every mode: namespaces of the daemon, of the engine, with
// the operator's image, and on the host network. The pod becomes NotReady, also for a restarted
// daemon, so that the kubelet creates it again.
func TestRestartedPause(t *testing.T) {
	restart := [][]string{{"restart", "-t", "0"}}
	eachFresh(t, func(t *testing.T, n *node) {
		flag := "" // of the running daemon
		n.loadPause(t, "sandbox.example/pause:1")
		for _, mode := range []struct {
			name, flag string
			network    runtimeapi.NamespaceMode
			commands   [][]string
			runs       bool // the restarted pause runs
		}{
			{
				name:     "own namespace",
				network:  runtimeapi.NamespaceMode_POD,
				commands: restart,
			},
			{
				name:     "host network",
				network:  runtimeapi.NamespaceMode_NODE,
				commands: restart,
				runs:     true,
			},
			{
				name:     "engine's namespace",
				flag:     "--pod-netns=engine",
				network:  runtimeapi.NamespaceMode_POD,
				commands: restart,
				runs:     true,
			},
			{
				name:     "sandbox image",
				flag:     "--pod-infra-container-image=sandbox.example/pause:1",
				network:  runtimeapi.NamespaceMode_POD,
				commands: [][]string{{"stop", "-t", "0"}, {"start"}},
				runs:     true,
			},
		} {
			t.Run(mode.name, func(t *testing.T) {
				if mode.flag != flag {
					flag = mode.flag
					n.Change(t, flag)
					n.AwaitReady(t)
				}

				cfg := n.podConfig(t)
				cfg.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{
					Network: mode.network,
					Pid:     runtimeapi.NamespaceMode_CONTAINER,
				}

				id := n.runPod(t, cfg)
				n.start(t, id, cfg, sh("sleep 1000"))
				for _, c := range mode.commands {
					args := slices.Concat([]string{"-H", "unix://" + n.own(t).Socket}, c, []string{id})
					out, err := n.own(t).Command("docker", args...).CombinedOutput()
					if err != nil && mode.runs {
						t.Fatalf("docker %v: %v %s", c, err, out)
					}
				}

				if got := n.inspect(t, id, ".State.Running"); mode.runs && got != "true" {
					t.Fatal("the restarted pause does not run")
				}

				if mode.name == "sandbox image" {
					n.Kill(t)
					n.Restart(t)
				}

				n.assertReplaced(t, id, cfg)
			})
		}
	})
}
