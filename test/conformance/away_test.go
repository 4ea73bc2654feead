package conformance

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// TestEndsWhileTheEngineIsAway ends containers while dockerd does not run, and the containerd that
// it manages. They are seen as ended with their own exit code, reason and time. A container that
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
			cc.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}
			return n.startConfig(t, pod, cfg, cc)
		}

		ends := map[string]end{
			start("exit", "echo last; exit 7"): {7, "Error"},
			start("success", "echo last"):      {0, "Completed"},
			start("memory", hog):               {137, "OOMKilled"},
		}

		killed := start("killed", "sleep 1000")
		ends[killed] = end{137, "Error"}
		running := start("running", "echo last; sleep 1000")
		for _, id := range append(slices.Collect(maps.Keys(ends)), running) {
			eventually(t, "the first line", func() bool {
				return strings.Contains(n.log(t, n.containerStatus(t, id).LogPath), "first")
			})
		}

		pid := n.inspect(t, killed, ".State.Pid")

		n.own(t).Kill(t)
		if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
			t.Fatal(err)
		}

		n.run(t, "kill", "-9", pid)
		time.Sleep(2 * time.Second) // the containers end meanwhile; dockerd must not see how
		back := time.Now()
		n.own(t).Restart(t)
		n.AwaitReady(t)

		for id, want := range ends {
			n.endedAs(t, id, want, back)
		}

		if s := n.containerStatus(t, running); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("the container that goes on: %v", s)
		}

		eventually(t, "the last line", func() bool {
			return strings.HasSuffix(n.log(t, n.containerStatus(t, running).LogPath), "last\n")
		})
		n.removePod(t, pod)
		n.assertNothingLeft(t, cfg)
	})
}

// end is how a container ends.
type end struct {
	code   int32
	reason string
}

// endedAs checks the status of a container that ended while the engine was away.
func (n *node) endedAs(t *testing.T, id string, want end, back time.Time) {
	t.Helper()
	s := n.waitExited(t, id)
	t.Logf("%s: exit code %d, %s, %s after the engine was started", s.Metadata.Name, s.ExitCode, s.Reason,
		time.Unix(0, s.FinishedAt).Sub(back))
	// containerd 2 forgets the exit code of a container that ended while it did not run either.
	if n.eng.Version == engines.V29 && !keepsExitCodes(t) {
		want = end{255, "Error"}
		back = time.Now()
	}

	if s.ExitCode != want.code || s.Reason != want.reason || s.FinishedAt < s.StartedAt ||
		s.FinishedAt > back.UnixNano() {
		t.Errorf("%v: %v", want, s)
	}

	if log := n.log(t, s.LogPath); !strings.Contains(log, "first\n") {
		t.Errorf("log %q", log)
	}
}

// keepsExitCodes reports whether the kernel keeps the exit code of a process for those who hold its
// pidfd (Linux 6.15).
func keepsExitCodes(t *testing.T) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}

	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}

	return major > 6 || major == 6 && minor >= 15
}
