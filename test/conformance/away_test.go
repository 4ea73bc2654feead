package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// TestEndsWhileTheEngineIsAway ends containers while dockerd does not run, and the containerd that
// it manages. They are seen as ended with the exit code that the engine knows. A container that
// goes on loses no line.
func TestEndsWhileTheEngineIsAway(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		dir := n.tempDir(t)
		start := func(name, last string) string {
			cc := n.containerConfig(sh("echo first; until [ -e /signal/go ]; do sleep 0.1; done; " + last))
			cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
			cc.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/signal"}}
			return n.startConfig(t, pod, cfg, cc)
		}
		exit7 := start("exit", "echo last; exit 7")
		exit0 := start("success", "echo last")
		running := start("running", "echo last; sleep 1000")
		for _, id := range []string{exit7, exit0, running} {
			eventually(t, "the first line", func() bool { return strings.Contains(n.log(t, n.containerStatus(t, id).LogPath), "first") })
		}

		n.own(t).Kill(t)
		if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second) // the containers end meanwhile; dockerd must not see how
		n.own(t).Restart(t)
		n.AwaitReady(t)

		for id, want := range map[string]int32{exit7: 7, exit0: 0} {
			s := n.waitExited(t, id)
			// containerd 2 forgets the exit status of a container that ended while it did not run either.
			unknown := n.eng.Version == engines.V29 && s.ExitCode == 255
			if s.ExitCode != want && !unknown || s.FinishedAt < s.StartedAt || (s.Reason == "Completed") != (s.ExitCode == 0) {
				t.Errorf("exit code %d: %v", want, s)
			}
			if log := n.log(t, s.LogPath); !strings.Contains(log, "first\n") {
				t.Errorf("log %q", log)
			}
		}
		if s := n.containerStatus(t, running); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("the container that goes on: %v", s)
		}
		eventually(t, "the last line", func() bool { return strings.HasSuffix(n.log(t, n.containerStatus(t, running).LogPath), "last\n") })
		n.removePod(t, pod)
		n.assertNothingLeft(t, cfg)
	})
}
