package conformance

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// record is a line of the CRI's log format.
var record = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d) (stdout|stderr) ` +
	`([FP]) (.*)$`)

// records are a log's lines without their times: stream, tag and text.
func records(t *testing.T, files ...string) (out []string) {
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

// untilTold waits for an exec of touch /tmp/go, and for the end of that touch: the container's own
// end would kill it.
const untilTold = "while [ ! -e /tmp/go ] || pidof touch >/dev/null; do usleep 10000; done"

func (n *node) logPath(cfg *runtimeapi.PodSandboxConfig, cc *runtimeapi.ContainerConfig) string {
	return filepath.Join(cfg.LogDirectory, cc.LogPath)
}

func (n *node) reopen(t *testing.T, id string) error {
	t.Helper()
	_, err := n.Runtime.ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
	return err
}

// rotate is what the kubelet does: it renames the log and asks for a new one.
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

// rotated are all files of a log in the order of their writing.
func rotated(t *testing.T, log string) []string {
	t.Helper()
	files, err := filepath.Glob(log + ".*")
	if err != nil {
		t.Fatal(err)
	}
	return append(files, log)
}

func TestLogFormat(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		long := strings.Repeat("0123456789", 4000)
		for name, test := range map[string]struct {
			script   string
			tty      bool
			stdin    bool
			sorted   bool // two streams have no order between them
			want     []string
			anyPiece bool // pieces may be cut anywhere
		}{
			"streams": {
				script: "echo to stdout; echo to stderr >&2",
				sorted: true,
				want:   []string{"stderr F to stderr", "stdout F to stdout"},
			},
			"blank":  {script: "echo; echo ' two  spaces '", want: []string{"stdout F ", "stdout F  two  spaces "}},
			"no end": {script: "echo one; printf two", want: []string{"stdout F one", "stdout P two"}},
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
			cc := n.containerConfig(sh(test.script))
			cc.Metadata.Name, cc.Tty, cc.Stdin = strings.ReplaceAll(name, " ", "-"), test.tty, test.stdin
			cc.LogPath = cc.Metadata.Name + "/0.log"
			id := n.startConfig(t, pod, cfg, cc)
			n.waitExited(t, id)
			got := records(t, n.logPath(cfg, cc))
			if test.sorted {
				slices.Sort(got)
			}
			if test.anyPiece {
				got = joined(t, got)
			}

			// Without its end a line may be taken for a whole one.
			if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", test.want) && strings.ReplaceAll(fmt.Sprintf("%q", got),
				"F two", "P two") != fmt.Sprintf("%q", test.want) {
				t.Errorf("%s: %.300q, want %.300q", name, got, test.want)
			}

			if st, err := os.Stat(n.logPath(cfg, cc)); err != nil || st.Mode().Perm()&0o177 != 0o040 ||
				!st.Mode().IsRegular() {
				t.Errorf("%s: %v, %v", name, st.Mode(), err)
			}
		}
	})
}

// joined puts pieces of lines together; each is at most 16 KiB long.
func joined(t *testing.T, records []string) (out []string) {
	t.Helper()
	line := ""
	for _, r := range records {
		f := strings.SplitN(r, " ", 3)
		if len(f[2]) > 16<<10 {
			t.Errorf("a piece of %d bytes", len(f[2]))
		}
		if line += f[2]; f[1] == "F" {
			out, line = append(out, line), ""
		}
	}

	return out
}

// TestLogIsCompleteWhenExited: whoever sees EXITED can read the last line.
func TestLogIsCompleteWhenExited(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for i := range 10 {
			cc := n.containerConfig(sh("seq 1 20000"))
			cc.Metadata.Attempt, cc.LogPath = uint32(i), fmt.Sprintf("main/%d.log", i)
			id := n.startConfig(t, pod, cfg, cc)
			n.waitExited(t, id)
			got := records(t, n.logPath(cfg, cc))
			if len(got) != 20000 || got[len(got)-1] != "stdout F 20000" {
				t.Errorf("attempt %d: %d lines", i, len(got))
			}
		}
	})
}

func TestReopenContainerLog(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("i=0; while :; do echo line $i; i=$((i+1)); usleep 1000; done"))
		id := n.create(t, pod, cfg, cc)
		log := n.logPath(cfg, cc)
		if err := n.reopen(t, id); status.Code(err) == codes.OK {
			t.Error("a created container's log was reopened")
		}

		if _, err := os.Lstat(log); err == nil {
			t.Error("a log was made in spite of the error")
		}

		n.startID(t, id)
		for i := range 10 {
			eventually(t, "lines", func() bool { st, err := os.Stat(log); return err == nil && st.Size() > 1000 })
			n.rotate(t, id, log, i)
		}

		if err := n.reopen(t, id); err != nil {
			t.Errorf("a log that nobody has renamed: %v", err)
		}

		if _, err := n.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id}); err !=
			nil {
			t.Fatal(err)
		}

		for i, r := range records(t, rotated(t, log)...) {
			if want := fmt.Sprintf("stdout F line %d", i); r != want {
				t.Fatalf("%q, want %q", r, want)
			}
		}

		if err := os.Remove(log); err != nil {
			t.Fatal(err)
		}

		if err := n.reopen(t, id); status.Code(err) == codes.OK {
			t.Error("an ended container's log was reopened")
		}

		if _, err := os.Lstat(log); err == nil {
			t.Error("a log was made in spite of the error")
		}

		if err := n.reopen(t, "unknown"); status.Code(err) != codes.NotFound {
			t.Errorf("an unknown container: %v", err)
		}
	})
}

func TestDockerLogs(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("seq 1 100; " + untilTold + "; seq 101 105; echo late >&2"))
		id := n.startConfig(t, pod, cfg, cc)
		log := n.logPath(cfg, cc)
		eventually(t, "lines", func() bool { return len(records(t, log)) == 100 })
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
			t.Errorf("docker logs --since of an hour from now: %v", got)
		}
		if got := lines("--until", "1h"); len(got) != 0 {
			t.Errorf("docker logs --until 1h: %v", got)
		}

		var wg sync.WaitGroup
		var follow []string
		wg.Go(func() { follow = lines("-f", "--tail", "6") })
		wg.Go(func() { // once the other is there, or not: what comes is seen in both cases
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

		if left, _ := os.ReadDir(cfg.LogDirectory); len(left) > 0 {
			t.Errorf("in the log directory: %v", left)
		}
	})
}

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

		eventually(t, "lines again", func() bool { st, err := os.Stat(log); return err == nil && st.Size() > 0 })
	})
}

// driverPID is the log-driver process's, as seen in the engine's namespaces; "" while there is
// none.
func (n *node) driverPID(t *testing.T) string {
	t.Helper()
	out, _ := n.own(t).Command("pgrep", "-f", "^/proc/self/exe log-driver").Output()
	return strings.TrimSpace(string(out))
}

func (n *node) killDriver(t *testing.T) {
	t.Helper()
	if out, err := n.own(t).Command("pkill", "-KILL", "-f", "^/proc/self/exe log-driver").CombinedOutput(); err != nil {
		t.Errorf("kill the log-driver process: %v %s", err, out)
	}
}

// metric is one of the log-driver process's figures.
func (n *node) metric(t *testing.T, name string) float64 {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", n.own(t).Path("/run/docker/plugins/cri-dockerd.sock"))
		}}}

	r, err := c.Get("http://log-driver/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()

	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}

	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, name+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(v), 64)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}

	t.Fatalf("no metric %s", name)

	return 0
}

// numberWriter is a container that writes numbered lines in bursts. While the file "hold" is there
// it rests after a burst, and says in "held" which line was the last. Its last burst waits for the
// file "end".
type numberWriter struct {
	n       *node
	id, log string
	control string // folder that it shares with the test
	last    int
}

func (n *node) startNumberWriter(t *testing.T, bursts, burst int) *numberWriter {
	t.Helper()
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	script := fmt.Sprintf(`burst=%d; bursts=%d; i=0
rest() { if [ -e /ctl/hold ]; then echo $((i*burst)) > /ctl/held; while [ -e /ctl/hold ]; do usleep 10000; done; rm /ctl/held; fi; }
while [ $i -lt $bursts ]; do
	seq $((i*burst+1)) $((i*burst+burst)); i=$((i+1)); usleep 25000; rest
	while [ $i -eq $((bursts-1)) ] && [ ! -e /ctl/end ]; do usleep 10000; rest; done
done`, burst, bursts)

	cc := n.containerConfig(sh(script))
	w := &numberWriter{n: n, control: n.tempDir(t), log: n.logPath(cfg, cc), last: bursts * burst}
	cc.Mounts = []*runtimeapi.Mount{{HostPath: w.control, ContainerPath: "/ctl"}}
	w.id = n.startConfig(t, pod, cfg, cc)

	return w
}

// hold lets the container rest, and waits until its last line is in the log.
func (w *numberWriter) hold(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.control, "hold"), nil, 0o644); err != nil {
		t.Fatal(err)
	}

	var held string
	eventually(t, "the container rests", func() bool {
		b, err := os.ReadFile(filepath.Join(w.control, "held"))
		held = strings.TrimSpace(string(b))
		return err == nil && held != ""
	})

	eventually(t, "line "+held+" is in the log", func() bool {
		for _, f := range []string{w.log, newest(w.log)} {
			if b, _ := os.ReadFile(f); strings.HasSuffix(string(b), " F "+held+"\n") {
				return true
			}
		}
		return held == ""
	})
}

// newest is the file to which a log was renamed last, "" without one.
func newest(log string) string {
	files, _ := filepath.Glob(log + ".*")
	if len(files) == 0 {
		return ""
	}
	return files[len(files)-1]
}

func (w *numberWriter) release(t *testing.T) {
	t.Helper()
	if err := os.Remove(filepath.Join(w.control, "hold")); err != nil {
		t.Fatal(err)
	}
}

func (w *numberWriter) ended(t *testing.T) bool {
	t.Helper()
	r, err := w.n.Runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: w.id})
	return err == nil && r.Status.State == runtimeapi.ContainerState_CONTAINER_EXITED
}

// rotate rotates the log as the kubelet does, until ctx ends and then until it has done so at least
// so many times.
func (w *numberWriter) rotate(ctx context.Context, t *testing.T, times int) {
	for done := 0; (done < times || ctx.Err() == nil) && t.Context().Err() == nil; {
		pause := 100 * time.Millisecond
		to := fmt.Sprintf("%s.20260102-%06d", w.log, done)
		if err := os.Rename(w.log, to); err == nil {
			if err := w.n.reopen(t, w.id); err == nil {
				done++
			} else if err := os.Rename(to, w.log); err != nil {
				// the daemon or the engine is away: the kubelet renames it back
				t.Error(err)
			} else { // again soon, to meet the moment in which it comes back
				pause = 5 * time.Millisecond
			}
		}

		time.Sleep(pause)
	}
}

// TestNoLineIsLost: a container writes 1,000,000 numbered lines while the log-driver process and
// the daemon are killed 20 times each, its log is rotated all the while, and the engine restarts.
// All lines must be there, each once, in order. The engine goes while the container rests, since
// what it has read and not handed over goes with it, whatever the log driver; meanwhile the
// container writes on.
func TestNoLineIsLost(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		w := n.startNumberWriter(t, 1000, 1000)
		var wg sync.WaitGroup
		killing, killed := context.WithCancel(t.Context())
		defer killed()

		wg.Go(func() { w.rotate(killing, t, 50) })
		for i := range 20 {
			engine := i%5 == 4
			if engine {
				w.hold(t)
				if i%2 == 0 {
					n.eng.Stop(t)
				} else {
					n.eng.Kill(t)
				}

				// before that, the log-driver process is killed before it has seen that the engine
				// is gone
				if i > 10 {
					eventually(t, "the log-driver process has seen that the engine is gone", func() bool {
						fifos, err := os.ReadDir(n.eng.Path("/run/docker/logging"))
						return err == nil && len(fifos) == 0
					})
				}

				w.release(t)
			}

			before := n.driverPID(t)
			n.killDriver(t)
			if i%2 == 0 {
				eventually(t, "the log-driver process runs again", func() bool {
					pid := n.driverPID(t)
					return pid != "" && pid != before
				})
			}

			if engine {
				n.eng.Restart(t)
			}

			n.Kill(t)
			n.Restart(t)
		}

		killed()
		wg.Wait()
		if err := os.WriteFile(filepath.Join(w.control, "end"), nil, 0o644); err != nil {
			t.Fatal(err)
		}

		if !within(time.Minute, func() bool { return w.ended(t) }) {
			t.Error("the container has not ended")
		}

		checkNumbers(t, w.last, rotated(t, w.log)...)
	})
}

// checkNumbers checks that logs hold the numbers from 1 to last, each once and in order.
func checkNumbers(t *testing.T, last int, files ...string) {
	t.Helper()
	want := 1
	for _, r := range records(t, files...) {
		got, err := strconv.Atoi(strings.TrimPrefix(r, "stdout F "))
		if err != nil || got != want {
			t.Errorf("%q after %d of %d", r, want-1, last)
			want = got
		}
		want++
	}

	if want != last+1 {
		t.Errorf("the last line is %d of %d", want-1, last)
	}
}

// TestFullDisk: the log's disk takes 1 MiB, the container prints more. It must not wait, and what
// is there must be whole.
func TestFullDisk(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		n.run(t, "mkdir", "-p", cfg.LogDirectory)
		n.run(t, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", cfg.LogDirectory)
		pod := n.runPod(t, cfg)
		const lines = 200000
		cc := n.containerConfig(sh(fmt.Sprintf("seq 1 %d; %s; echo end", lines, untilTold)))
		id := n.startConfig(t, pod, cfg, cc)
		log := n.eng.Path(n.logPath(cfg, cc))
		dropped := func() float64 { return n.metric(t, `cri_dockerd_log_dropped_lines_total{reason="disk"}`) }
		eventually(t, "all lines are written or dropped", func() bool {
			return dropped()+n.metric(t, "cri_dockerd_log_lines_total") == lines
		})
		got := records(t, log)
		if len(got) == 0 || len(got) == lines || dropped() != float64(lines-len(got)) {
			t.Errorf("%d lines are written, %v dropped", len(got), dropped())
		}
		if err := os.Truncate(log, 0); err != nil { // room again
			t.Fatal(err)
		}

		n.exec(t, id, "touch", "/tmp/go")
		n.waitExited(t, id)
		if got := records(t, log); fmt.Sprint(got) != "[stdout F end]" {
			t.Errorf("afterwards: %.100q", got)
		}

		b, err := os.ReadFile(filepath.Join(n.eng.Dir, "run/log-driver/log"))
		if err != nil || strings.Count(string(b), "is dropped") != 1 {
			t.Errorf("the process's log: %s, %v", b, err)
		}
	})
}

// logsCondition is what Status says of container logs, and whether the runtime is ready.
func (n *node) logsCondition(t *testing.T) (logs *runtimeapi.RuntimeCondition, ready bool) {
	t.Helper()
	s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range s.Status.Conditions {
		switch c.Type {
		case "ContainerLogs":
			logs = c
		case "RuntimeReady":
			ready = c.Status
		}
	}

	if logs == nil {
		t.Fatal("no condition ContainerLogs")
	}

	return logs, ready
}

// TestLogDriverCannotStart: nobody can make a socket where Docker looks for it.
func TestLogDriverCannotStart(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.run(t, "mkdir", "-p", "/run/docker/plugins")
		n.run(t, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/run/docker/plugins")
		n.Daemon = n.eng.Daemon(t)
		logs, _ := n.logsCondition(t)
		if logs.Status || logs.Reason != "JSONFile" || !strings.Contains(logs.Message, "read-only file system") {
			t.Errorf("auto: %v", logs)
		}

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		id := n.start(t, pod, cfg, sh("echo one; sleep 1000"))
		path := n.containerStatus(t, id).LogPath
		if st, err := os.Lstat(path); err != nil || st.Mode()&os.ModeSymlink == 0 {
			t.Errorf("the log in fallback mode: %v, %v", st, err)
		}

		eventually(t, "its line", func() bool { return n.log(t, path) == "one\n" })
		n.removePod(t, pod)

		n.Change(t, "--container-log=cri")
		eventually(t, "the daemon says what is wrong", func() bool {
			logs, ready := n.logsCondition(t)
			return !ready && logs.Reason == "LogDriverNotReady" &&
				strings.Contains(logs.Message, "read-only file system")
		})

		n.run(t, "umount", "/run/docker/plugins")
		eventually(t, "ready once it can be", func() bool {
			logs, ready := n.logsCondition(t)
			return ready && logs.Reason == "CRIFiles"
		})
	})
}

// TestJSONFileMode: containers of this mode, as older shims made them, are rotated by copying, also
// by a daemon that has gone over to CRI files.
func TestJSONFileMode(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		n.Change(t, "--container-log=json-file")
		n.AwaitReady(t)
		if logs, ready := n.logsCondition(t); !logs.Status || !ready || logs.Reason != "JSONFile" {
			t.Errorf("json-file: %v", logs)
		}
		if pid := n.driverPID(t); pid != "" {
			n.killDriver(t)
		}

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("i=0; while :; do if [ -e /tmp/go ]; then echo line $i; i=$((i+1)); rm /tmp/go; " +
			"fi; usleep 5000; done"))
		id := n.startConfig(t, pod, cfg, cc)
		log := n.logPath(cfg, cc)
		var want string
		line := func(i int) {
			t.Helper()
			n.exec(t, id, "touch", "/tmp/go")
			want += fmt.Sprintf("line %d\n", i)
			eventually(t, "the line", func() bool {
				return strings.HasSuffix(n.log(t, log), fmt.Sprintf("line %d\n", i))
			})
		}

		check := func() {
			t.Helper()
			var got string
			for _, f := range rotated(t, log) {
				got += n.log(t, f)
			}

			if got != want {
				t.Errorf("%q, want %q", got, want)
			}
		}

		for i := range 4 {
			if i == 2 {
				n.Change(t)
				n.AwaitReady(t)
				if logs, _ := n.logsCondition(t); logs.Reason != "CRIFiles" {
					t.Errorf("auto: %v", logs)
				}
			}

			line(2 * i)
			n.rotate(t, id, log, i)
			line(2*i + 1)
			check()
		}

		n.removePod(t, pod)
		if _, err := os.Lstat(log); !os.IsNotExist(err) {
			t.Errorf("the link after the container: %v", err)
		}

		if got := len(rotated(t, log)); got != 5 {
			t.Errorf("rotated files after the container: %d", got-1)
		}
	})
}

// TestShortContainersLeaveNoDescriptor counts what the log-driver process has open.
func TestShortContainersLeaveNoDescriptor(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		open := func() int {
			return len(strings.Fields(n.run(t, "ls", "/proc/"+n.driverPID(t)+"/fd")))
		}
		var before int
		for i := range 40 {
			cc := n.containerConfig(sh("echo one"))
			cc.Metadata.Attempt, cc.LogPath = uint32(i), fmt.Sprintf("main/%d.log", i)
			id := n.startConfig(t, pod, cfg, cc)
			n.waitExited(t, id)
			if got := records(t, n.logPath(cfg, cc)); fmt.Sprint(got) != "[stdout F one]" {
				t.Errorf("%d: %q", i, got)
			}

			if _, err := n.Runtime.RemoveContainer(t.Context(),
				&runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
				t.Error(err)
			}

			if i == 9 {
				before = open()
			}
		}

		if after := open(); after > before {
			t.Errorf("%d files are open, %d after the first ten containers", after, before)
		}

		for _, dir := range []string{n.eng.Path("/run/docker/logging"),
			filepath.Join(n.eng.Dir, "run/log-driver/streams")} {
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left in %s: %v, %v", dir, left, err)
			}
		}
	})
}

// TestPlantedLog: what somebody puts in the place of a container's log, before its start or during
// a rotation, is replaced, and what a link leads to is not touched.
func TestPlantedLog(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		foreign := filepath.Join(t.TempDir(), "foreign")
		if err := os.WriteFile(foreign, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}

		for name, plant := range map[string]func(at string) error{
			"link": func(at string) error { return os.Symlink(foreign, at) },
			"fifo": func(at string) error { return syscall.Mkfifo(at, 0o600) },
		} {
			cfg := n.podConfig(t)
			pod := n.runPod(t, cfg)
			cc := n.containerConfig(sh("echo before; " + untilTold + "; echo after"))
			log := n.logPath(cfg, cc)
			if err := os.MkdirAll(filepath.Dir(log), 0o755); err != nil {
				t.Fatal(err)
			}

			if err := plant(log); err != nil {
				t.Fatal(err)
			}

			id := n.create(t, pod, cfg, cc)
			n.startID(t, id)
			eventually(t, name+": the first line", func() bool {
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
				t.Fatalf("%s: ReopenContainerLog: %v", name, err)
			}

			if _, err := n.Runtime.ExecSync(t.Context(),
				&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"touch", "/tmp/go"}}); err != nil {
				t.Fatal(err)
			}

			eventually(t, name+": the container has exited", func() bool {
				r, err := n.Runtime.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
				return err == nil && r.Status.State == runtimeapi.ContainerState_CONTAINER_EXITED
			})

			if got := records(t, old, log); !slices.Equal(got, []string{"stdout F before", "stdout F after"}) {
				t.Errorf("%s: the log is %q", name, got)
			}
		}

		if b, err := os.ReadFile(foreign); err != nil || string(b) != "precious" {
			t.Errorf("the foreign file is %q, %v", b, err)
		}
	})
}
