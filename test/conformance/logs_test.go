package conformance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// record matches a line of the CRI's log format.
var record = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d) (stdout|stderr) ` +
	`([FP]) (.*)$`)

// readRecords returns the lines of log files without their times: stream, tag and text.
func readRecords(t *testing.T, files ...string) (out []string) {
	t.Helper()
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}

		for line := range strings.Lines(string(b)) {
			m := record.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
			if m == nil || !strings.HasSuffix(line, "\n") {
				t.Fatalf("%s: not a record: %.100q", f, line)
			}
			out = append(out, m[1]+" "+m[2]+" "+m[3])
		}
	}

	return out
}

// waitForGo is a shell loop that waits for an exec of touch /tmp/go, and for the exit of touch: the
// exit of the container would kill it.
const waitForGo = "while [ ! -e /tmp/go ] || pidof touch >/dev/null; do usleep 10000; done"

func (n *node) logPath(cfg *runtimeapi.PodSandboxConfig, cc *runtimeapi.ContainerConfig) string {
	return filepath.Join(cfg.LogDirectory, cc.LogPath)
}

func (n *node) reopen(t *testing.T, id string) error {
	t.Helper()
	_, err := n.Runtime.ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
	return err
}

// rotate rotates a log like the kubelet: it renames the file and reopens the log.
func (n *node) rotate(t *testing.T, id, log string, i int) {
	t.Helper()
	if err := os.Rename(log, fmt.Sprintf("%s.20260102-%06d", log, i)); err != nil {
		t.Fatal(err)
	}

	if err := n.reopen(t, id); err != nil {
		t.Fatalf("ReopenContainerLog: %v", err)
	}

	if _, err := os.Lstat(log); err != nil {
		t.Errorf("after ReopenContainerLog: %v", err)
	}
}

// logFiles returns all files of a log in the order of their creation.
func logFiles(t *testing.T, log string) []string {
	t.Helper()
	files, err := filepath.Glob(log + ".*")
	if err != nil {
		t.Fatal(err)
	}
	return append(files, log)
}

// TestLogFormat checks the records of different kinds of output.
func TestLogFormat(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		long := strings.Repeat("0123456789", 4000)
		for name, c := range map[string]struct {
			script   string
			tty      bool
			stdin    bool
			sorted   bool // records of two streams have no defined order
			want     []string
			anyPiece bool // lines may be split anywhere
		}{
			"streams": {
				script: "echo to stdout; echo to stderr >&2",
				sorted: true,
				want:   []string{"stderr F to stderr", "stdout F to stdout"},
			},
			"blank": {
				script: "echo; echo ' two  spaces '",
				want:   []string{"stdout F ", "stdout F  two  spaces "},
			},
			"no newline": {
				script: "echo one; printf two",
				want:   []string{"stdout F one", "stdout P two"},
			},
			"terminal": {
				script: "echo one; echo two >&2",
				tty:    true,
				want:   []string{"stdout F one\r", "stdout F two\r"},
			},
			"input": {script: "echo one", stdin: true, want: []string{"stdout F one"}},
			"long": {
				script:   `i=0; while [ $i -lt 4000 ]; do printf 0123456789; i=$((i+1)); done; echo; echo short`,
				want:     []string{long, "short"},
				anyPiece: true,
			},
		} {
			t.Run(name, func(t *testing.T) {
				cc := n.containerConfig(sh(c.script))
				cc.Metadata.Name, cc.Tty, cc.Stdin = strings.ReplaceAll(name, " ", "-"), c.tty, c.stdin
				cc.LogPath = cc.Metadata.Name + "/0.log"
				id := n.startConfig(t, pod, cfg, cc)
				n.waitExited(t, id)
				got := readRecords(t, n.logPath(cfg, cc))
				if c.sorted {
					slices.Sort(got)
				}
				if c.anyPiece {
					got = joinPieces(t, got)
				}

				// The last line without a newline may be tagged as complete.
				if i := slices.Index(got, "stdout F two"); name == "no newline" && i >= 0 {
					got[i] = "stdout P two"
				}
				if !slices.Equal(got, c.want) {
					t.Errorf("%.300q, want %.300q", got, c.want)
				}

				if st, err := os.Stat(n.logPath(cfg, cc)); err != nil || st.Mode().Perm()&0o177 != 0o040 ||
					!st.Mode().IsRegular() {
					t.Errorf("log file %v, %v; want a regular file readable by its group", st, err)
				}
			})
		}
	})
}

// joinPieces joins pieces of lines. Each piece has at most 16 KiB.
func joinPieces(t *testing.T, records []string) (out []string) {
	t.Helper()
	line := ""
	for _, r := range records {
		f := strings.SplitN(r, " ", 3)
		if len(f[2]) > 16<<10 {
			t.Errorf("piece of %d bytes, want at most 16 KiB", len(f[2]))
		}
		if line += f[2]; f[1] == "F" {
			out, line = append(out, line), ""
		}
	}

	return out
}

// TestLogIsCompleteWhenExited checks that the log has the last line as soon as the status is
// EXITED.
func TestLogIsCompleteWhenExited(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for i := range 10 {
			cc := n.containerConfig(sh("seq 1 20000"))
			cc.Metadata.Attempt, cc.LogPath = uint32(i), fmt.Sprintf("main/%d.log", i)
			id := n.startConfig(t, pod, cfg, cc)
			n.waitExited(t, id)

			got := readRecords(t, n.logPath(cfg, cc))
			if len(got) != 20000 || got[len(got)-1] != "stdout F 20000" {
				t.Errorf("attempt %d: log has %d lines, want 20000", i, len(got))
			}
		}
	})
}

// TestReopenContainerLog rotates the log of a container that writes continuously.
func TestReopenContainerLog(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("i=0; while :; do echo line $i; i=$((i+1)); usleep 1000; done"))
		id := n.create(t, pod, cfg, cc)
		log := n.logPath(cfg, cc)
		if err := n.reopen(t, id); status.Code(err) == codes.OK {
			t.Error("ReopenContainerLog of a created container succeeded")
		}

		if _, err := os.Lstat(log); !errors.Is(err, fs.ErrNotExist) {
			t.Error("a failed ReopenContainerLog created a log")
		}

		n.startID(t, id)
		for i := range 10 {
			eventually(t, "lines", func() bool {
				st, err := os.Stat(log)
				return err == nil && st.Size() > 1000
			})
			n.rotate(t, id, log, i)
		}

		if err := n.reopen(t, id); err != nil {
			t.Errorf("ReopenContainerLog without a rename: %v", err)
		}

		if _, err := n.Runtime.StopContainer(t.Context(),
			&runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
			t.Fatal(err)
		}

		for i, r := range readRecords(t, logFiles(t, log)...) {
			if want := fmt.Sprintf("stdout F line %d", i); r != want {
				t.Fatalf("record %q, want %q", r, want)
			}
		}

		if err := os.Remove(log); err != nil {
			t.Fatal(err)
		}

		if err := n.reopen(t, id); status.Code(err) == codes.OK {
			t.Error("ReopenContainerLog of an exited container succeeded")
		}

		if _, err := os.Lstat(log); !errors.Is(err, fs.ErrNotExist) {
			t.Error("a failed ReopenContainerLog created a log")
		}

		if err := n.reopen(t, "unknown"); status.Code(err) != codes.NotFound {
			t.Errorf("ReopenContainerLog of an unknown container: %v, want NotFound", err)
		}
	})
}

// TestDockerLogs reads the CRI log files with `docker logs` and its options.
func TestDockerLogs(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("seq 1 100; " + waitForGo + "; seq 101 105; echo late >&2"))
		id := n.startConfig(t, pod, cfg, cc)
		log := n.logPath(cfg, cc)
		eventually(t, "lines", func() bool { return len(readRecords(t, log)) == 100 })
		n.rotate(t, id, log, 1)
		lines := func(args ...string) []string {
			return strings.Fields(n.docker(t, append(append([]string{"logs"}, args...), id)...))
		}
		if got := lines(); len(got) != 100 || got[0] != "1" || got[99] != "100" {
			t.Errorf("docker logs: %v", got)
		}
		if got := lines("--tail", "3"); fmt.Sprint(got) != "[98 99 100]" {
			t.Errorf("docker logs --tail 3: %v", got)
		}
		if got := lines("--since", "1h"); len(got) != 100 {
			t.Errorf("docker logs --since 1h: %v", got)
		}
		if got := lines("--since", time.Now().Add(time.Hour).Format(time.RFC3339)); len(got) != 0 {
			t.Errorf("docker logs --since an hour from now: %v", got)
		}
		if got := lines("--until", "1h"); len(got) != 0 {
			t.Errorf("docker logs --until 1h: %v", got)
		}

		var wg sync.WaitGroup
		var follow []string
		wg.Go(func() { follow = lines("-f", "--tail", "6") })
		wg.Go(func() { // before or after the start of docker logs: both must show the lines
			n.exec(t, id, "touch", "/tmp/go")
		})
		wg.Wait()
		if !slices.Contains(follow, "105") || !slices.Contains(follow, "late") || slices.Contains(follow, "94") {
			t.Errorf("docker logs -f --tail 6: %v", follow)
		}

		n.waitExited(t, id)
		if got := lines("--tail", "2", "-t"); len(got) != 4 || !slices.Contains(got, "late") &&
			!slices.Contains(got, "105") {
			t.Errorf("docker logs --tail 2 -t: %v", got)
		}
	})
}

// TestContainerWithoutLogPath checks that `docker logs` works and ReopenContainerLog fails.
func TestContainerWithoutLogPath(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("echo one"))
		cc.LogPath = ""
		id := n.startConfig(t, pod, cfg, cc)
		n.waitExited(t, id)
		if got := n.docker(t, "logs", id); got != "one\n" {
			t.Errorf("docker logs: %q", got)
		}
		if err := n.reopen(t, id); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("ReopenContainerLog: %v", err)
		}

		if files, _ := os.ReadDir(cfg.LogDirectory); len(files) > 0 {
			t.Errorf("log directory has files: %v", files)
		}
	})
}

// TestLogDirectoryDeleted removes the log directory of a running container: it is created again.
func TestLogDirectoryDeleted(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("while :; do echo line; usleep 10000; done"))
		n.startConfig(t, pod, cfg, cc)
		log := n.logPath(cfg, cc)
		eventually(t, "lines", func() bool { _, err := os.Stat(log); return err == nil })
		if err := os.RemoveAll(cfg.LogDirectory); err != nil {
			t.Fatal(err)
		}

		eventually(t, "new log", func() bool {
			st, err := os.Stat(log)
			return err == nil && st.Size() > 0
		})
	})
}

// TestPlantedLog creates a link or a FIFO at the path of a container's log, before its start and
// during a rotation. The daemon replaces it and does not modify the target of the link.
func TestPlantedLog(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		target := filepath.Join(t.TempDir(), "foreign")
		if err := os.WriteFile(target, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}

		for name, plant := range map[string]func(at string) error{
			"link": func(at string) error { return os.Symlink(target, at) },
			"fifo": func(at string) error { return syscall.Mkfifo(at, 0o600) },
		} {
			t.Run(name, func(t *testing.T) {
				cfg := n.podConfig(t)
				pod := n.runPod(t, cfg)
				cc := n.containerConfig(sh("echo before; " + waitForGo + "; echo after"))
				log := n.logPath(cfg, cc)
				if err := os.MkdirAll(filepath.Dir(log), 0o755); err != nil {
					t.Fatal(err)
				}

				if err := plant(log); err != nil {
					t.Fatal(err)
				}

				id := n.create(t, pod, cfg, cc)
				n.startID(t, id)
				eventually(t, "first line of the log", func() bool {
					st, err := os.Lstat(log)
					return err == nil && st.Mode().IsRegular() && st.Size() > 0
				})

				old := log + ".20260102-030405"
				if err := os.Rename(log, old); err != nil {
					t.Fatal(err)
				}

				if err := plant(log); err != nil {
					t.Fatal(err)
				}

				if err := n.reopen(t, id); err != nil {
					t.Fatalf("ReopenContainerLog: %v", err)
				}

				if _, err := n.Runtime.ExecSync(t.Context(),
					&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"touch", "/tmp/go"}}); err != nil {
					t.Fatal(err)
				}

				eventually(t, "exit of the container", func() bool {
					r, err := n.Runtime.ContainerStatus(t.Context(),
						&runtimeapi.ContainerStatusRequest{ContainerId: id})
					return err == nil && r.Status.State == runtimeapi.ContainerState_CONTAINER_EXITED
				})

				if got := readRecords(t, old, log); !slices.Equal(got, []string{"stdout F before", "stdout F after"}) {
					t.Errorf("log %q", got)
				}
			})
		}

		if b, err := os.ReadFile(target); err != nil || string(b) != "precious" {
			t.Errorf("target of the link: %q, %v", b, err)
		}
	})
}
