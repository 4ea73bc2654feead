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
)

// TestExitsWhileTheEngineIsStopped ends containers while dockerd and its managed containerd are
// stopped. Each container is reported with its own exit code, reason and time. A running container
// loses no line of output.
func TestExitsWhileTheEngineIsStopped(t *testing.T) {
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
			start("memory", exhaustMemory):     {137, "OOMKilled"},
		}

		killed := start("killed", "sleep 1000")
		ends[killed] = end{137, "Error"}
		running := start("running", "echo last; sleep 1000")
		for _, id := range append(slices.Collect(maps.Keys(ends)), running) {
			eventually(t, "first line of output", func() bool {
				return strings.Contains(n.log(t, n.containerStatus(t, id).LogPath), "first")
			})
		}

		pid := n.inspect(t, killed, ".State.Pid")

		n.own(t).Kill(t)
		if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
			t.Fatal(err)
		}

		n.run(t, "kill", "-9", pid)
		time.Sleep(2 * time.Second) // the containers end before dockerd returns
		restarted := time.Now()
		n.own(t).Restart(t)
		n.AwaitReady(t)

		for id, want := range ends {
			n.assertEnd(t, id, want, restarted)
		}

		if s := n.containerStatus(t, running); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("the running container: %v", s)
		}

		eventually(t, "last line of output", func() bool {
			return strings.HasSuffix(n.log(t, n.containerStatus(t, running).LogPath), "last\n")
		})
		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
	})
}

// end is the expected exit of a container.
type end struct {
	code   int32
	reason string
}

// assertEnd checks the status of a container that exited while the engine was stopped.
func (n *node) assertEnd(t *testing.T, id string, want end, restarted time.Time) {
	t.Helper()
	s := n.waitExited(t, id)
	t.Logf("%s: exit code %d, %s, %s after the engine was started", s.Metadata.Name, s.ExitCode, s.Reason,
		time.Unix(0, s.FinishedAt).Sub(restarted))
	// containerd 2 loses the exit code if the container ends while containerd is stopped.
	if n.eng.HasProgram(t, "containerd", "2.0") && !keepsExitCodes(t) {
		want = end{255, "Error"}
		restarted = time.Now()
	}

	if s.ExitCode != want.code || s.Reason != want.reason || s.FinishedAt < s.StartedAt ||
		s.FinishedAt > restarted.UnixNano() {
		t.Errorf("status %v, want %v", s, want)
	}

	if log := n.log(t, s.LogPath); !strings.Contains(log, "first\n") {
		t.Errorf("log %q lacks the first line", log)
	}
}

// keepsExitCodes reports whether the kernel keeps the exit code of a process for holders of its
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
