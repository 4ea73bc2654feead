package conformance

import (
	"encoding/json"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sandboxPID is the pause's PID as the daemon knows it.
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

// assertReplaced fails unless a pod whose pause was restarted is NotReady, takes no containers, and
// is made anew.
func (n *node) assertReplaced(t *testing.T, id string, cfg *runtimeapi.PodSandboxConfig) {
	t.Helper()
	seen := func() bool { return n.sandboxPID(t, id) == n.inspect(t, id, ".State.Pid") }
	eventually(t, "the daemon has seen the restart", seen)
	if got := n.podStatus(t, id).State; got != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("the pod is %v", got)
	}
	if err := n.createErr(t, id, cfg, n.containerConfig(sh("true"))); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("CreateContainer: %v", err)
	}

	anew := n.runPod(t, cfg)
	if anew == id || n.podStatus(t, anew).State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("RunPodSandbox of the same pod: %s, was %s", anew, id)
	}

	n.removePod(t, anew)
	n.assertNothingLeft(t, cfg)
}

// TestRestartedPause restarts pauses of every mode: own namespaces, the engine's, an image of the
// operator's, the host network. The pod is NotReady, also for a daemon that starts afterwards, so
// that the kubelet makes it anew.
func TestRestartedPause(t *testing.T) {
	restart := []string{"restart", "-t", "0"}
	eachFresh(t, func(t *testing.T, n *node) {
		flag := "" // the daemon's
		n.loadPause(t, "sandbox.example/pause:1")
		for _, mode := range []struct {
			name, flag string
			network    runtimeapi.NamespaceMode
			commands   [][]string
			runs       bool // the pause runs again
		}{
			{"own namespace", "", runtimeapi.NamespaceMode_POD, [][]string{restart}, false},
			{"host network", "", runtimeapi.NamespaceMode_NODE, [][]string{restart}, true},
			{"engine's namespace", "--pod-netns=engine", runtimeapi.NamespaceMode_POD, [][]string{restart}, true},
			{"sandbox image", "--pod-infra-container-image=sandbox.example/pause:1", runtimeapi.NamespaceMode_POD,
				[][]string{{"stop", "-t", "0"}, {"start"}}, true},
		} {
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
				out, err := n.own(t).Command("docker", append(append([]string{"-H", "unix://" + n.own(t).Socket}, c...),
					id)...).CombinedOutput()
				if err != nil && mode.runs {
					t.Fatalf("%s: docker %v: %v %s", mode.name, c, err, out)
				}
			}

			if got := n.inspect(t, id, ".State.Running"); mode.runs && got != "true" {
				t.Fatalf("%s: the pause does not run again", mode.name)
			}

			if mode.name == "sandbox image" {
				n.Kill(t)
				n.Restart(t)
			}

			n.assertReplaced(t, id, cfg)
		}
	})
}
