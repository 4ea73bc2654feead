package conformance

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// driverPID returns the PID of the log-driver process in the engine's namespaces, or "" if it does
// not run.
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

// metric returns the value of a metric of the log-driver process.
func (n *node) metric(t *testing.T, name string) float64 {
	t.Helper()
	socket := n.own(t).Path("/run/docker/plugins/cri-dockerd.sock")
	c := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}

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

// TestFullDisk limits the log's disk to 1 MiB and prints more. The container must not block, and
// all written lines must be complete.
func TestFullDisk(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		n.run(t, "mkdir", "-p", cfg.LogDirectory)
		n.run(t, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", cfg.LogDirectory)
		pod := n.runPod(t, cfg)
		const lines = 200000
		cc := n.containerConfig(sh(fmt.Sprintf("seq 1 %d; %s; echo end", lines, waitForGo)))
		id := n.startConfig(t, pod, cfg, cc)
		log := n.eng.Path(n.logPath(cfg, cc))
		dropped := func() float64 { return n.metric(t, `cri_dockerd_log_dropped_lines_total{reason="disk"}`) }
		eventually(t, "written or dropped lines", func() bool {
			return dropped()+n.metric(t, "cri_dockerd_log_lines_total") == lines
		})
		got := readRecords(t, log)
		if len(got) == 0 || len(got) == lines || dropped() != float64(lines-len(got)) {
			t.Errorf("%d lines written, %v dropped, want %d in total", len(got), dropped(), lines)
		}
		if err := os.Truncate(log, 0); err != nil { // frees space
			t.Fatal(err)
		}

		n.exec(t, id, "touch", "/tmp/go")
		n.waitExited(t, id)
		if got := readRecords(t, log); fmt.Sprint(got) != "[stdout F end]" {
			t.Errorf("records after the truncation: %.100q", got)
		}

		b, err := os.ReadFile(filepath.Join(n.eng.Dir, "run/log-driver/log"))
		if err != nil || strings.Count(string(b), "dropping the output of a container") != 1 {
			t.Errorf("log of the log-driver process: %s, %v; want one report of dropped lines", b, err)
		}
	})
}

// logsCondition returns the condition ContainerLogs, and whether the runtime is ready.
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

// TestLogDriverCannotStart mounts Docker's plugin directory read-only, so that the log-driver
// process cannot create its socket.
func TestLogDriverCannotStart(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.run(t, "mkdir", "-p", "/run/docker/plugins")
		n.run(t, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/run/docker/plugins")
		n.Daemon = n.eng.Daemon(t)
		logs, _ := n.logsCondition(t)
		if logs.Status || logs.Reason != "JSONFile" || !strings.Contains(logs.Message, "read-only file system") {
			t.Errorf("condition with --container-log=auto: %v", logs)
		}

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		id := n.start(t, pod, cfg, sh("echo one; sleep 1000"))
		path := n.containerStatus(t, id).LogPath
		if st, err := os.Lstat(path); err != nil || st.Mode()&os.ModeSymlink == 0 {
			t.Errorf("log in fallback mode: %v, %v; want a link", st, err)
		}

		eventually(t, "line of the container", func() bool { return n.log(t, path) == "one\n" })
		n.removePod(t, pod)

		n.Change(t, "--container-log=cri")
		eventually(t, "condition with the cause", func() bool {
			logs, ready := n.logsCondition(t)
			return !ready && logs.Reason == "LogDriverNotReady" &&
				strings.Contains(logs.Message, "read-only file system")
		})

		n.run(t, "umount", "/run/docker/plugins")
		eventually(t, "RuntimeReady after the unmount", func() bool {
			logs, ready := n.logsCondition(t)
			return ready && logs.Reason == "CRIFiles"
		})
	})
}

// TestJSONFileMode rotates json-file containers by copying. Older shims create such containers. A
// daemon that has switched to CRI files must rotate them as well.
func TestJSONFileMode(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		n.Change(t, "--container-log=json-file")
		n.AwaitReady(t)
		if logs, ready := n.logsCondition(t); !logs.Status || !ready || logs.Reason != "JSONFile" {
			t.Errorf("condition with --container-log=json-file: %v", logs)
		}
		if pid := n.driverPID(t); pid != "" {
			n.killDriver(t)
		}

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("i=0; while :; do " +
			"if [ -e /tmp/go ]; then echo line $i; i=$((i+1)); rm /tmp/go; fi; usleep 5000; done"))
		id := n.startConfig(t, pod, cfg, cc)
		log := n.logPath(cfg, cc)
		var want string
		line := func(i int) {
			t.Helper()
			n.exec(t, id, "touch", "/tmp/go")
			want += fmt.Sprintf("line %d\n", i)
			eventually(t, "logged line", func() bool {
				return strings.HasSuffix(n.log(t, log), fmt.Sprintf("line %d\n", i))
			})
		}

		check := func() {
			t.Helper()
			var got string
			for _, f := range logFiles(t, log) {
				got += n.log(t, f)
			}

			if got != want {
				t.Errorf("log %q, want %q", got, want)
			}
		}

		for i := range 4 {
			if i == 2 {
				n.Change(t)
				n.AwaitReady(t)
				if logs, _ := n.logsCondition(t); logs.Reason != "CRIFiles" {
					t.Errorf("condition with --container-log=auto: %v", logs)
				}
			}

			line(2 * i)
			n.rotate(t, id, log, i)
			line(2*i + 1)
			check()
		}

		n.removePod(t, pod)
		if _, err := os.Lstat(log); !os.IsNotExist(err) {
			t.Errorf("link after the removal of the container: %v", err)
		}

		if got := len(logFiles(t, log)); got != 5 {
			t.Errorf("%d rotated files after the removal of the container, want 4", got-1)
		}
	})
}

// TestShortContainersLeaveNoDescriptor counts the open files of the log-driver process.
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
			if got := readRecords(t, n.logPath(cfg, cc)); fmt.Sprint(got) != "[stdout F one]" {
				t.Errorf("container %d: log %q", i, got)
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
			t.Errorf("%d open files, want at most %d as after ten containers", after, before)
		}

		for _, dir := range []string{
			n.eng.Path("/run/docker/logging"),
			filepath.Join(n.eng.Dir, "run/log-driver/streams"),
		} {
			if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
				t.Errorf("files remain in %s: %v, %v", dir, files, err)
			}
		}
	})
}
