package conformance

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// numberWriter is a container that writes numbered lines in bursts. While the file "hold" exists,
// it pauses after each burst and writes the number of the last line to "held". Before the last
// burst it waits for the file "end".
type numberWriter struct {
	n       *node
	id, log string
	control string // directory shared with the test
	last    int
}

func (n *node) startNumberWriter(t *testing.T, bursts, burst int) *numberWriter {
	t.Helper()
	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	script := fmt.Sprintf(`burst=%d; bursts=%d; i=0
pause() {
	[ -e /ctl/hold ] || return
	echo $((i*burst)) > /ctl/held; while [ -e /ctl/hold ]; do usleep 10000; done; rm /ctl/held
}
while [ $i -lt $bursts ]; do
	seq $((i*burst+1)) $((i*burst+burst)); i=$((i+1)); usleep 25000; pause
	while [ $i -eq $((bursts-1)) ] && [ ! -e /ctl/end ]; do usleep 10000; pause; done
done`, burst, bursts)

	cc := n.containerConfig(sh(script))
	w := &numberWriter{n: n, control: n.tempDir(t), log: n.logPath(cfg, cc), last: bursts * burst}
	cc.Mounts = []*runtimeapi.Mount{{HostPath: w.control, ContainerPath: "/ctl"}}
	w.id = n.startConfig(t, pod, cfg, cc)

	return w
}

// hold pauses the container and waits until its last line is in the log.
func (w *numberWriter) hold(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.control, "hold"), nil, 0o644); err != nil {
		t.Fatal(err)
	}

	var held string
	eventually(t, "pause of the container", func() bool {
		b, err := os.ReadFile(filepath.Join(w.control, "held"))
		held = strings.TrimSpace(string(b))
		return err == nil && held != ""
	})

	// The log may have been rotated many times since, with nothing written.
	eventually(t, "line "+held+" in the log", func() bool {
		files, _ := filepath.Glob(w.log + "*")
		return slices.ContainsFunc(files, func(f string) bool { return endsWith(f, " F "+held+"\n") })
	})
}

// endsWith reports whether the content of a file has this end.
func endsWith(file, end string) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()

	got := make([]byte, len(end))
	if _, err := f.Seek(-int64(len(end)), io.SeekEnd); err != nil {
		return false
	}
	_, err = io.ReadFull(f, got)

	return err == nil && string(got) == end
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

// rotate rotates the log like the kubelet until ctx ends, and at least the given number of times.
func (w *numberWriter) rotate(ctx context.Context, t *testing.T, times int) {
	for done := 0; (done < times || ctx.Err() == nil) && t.Context().Err() == nil; {
		pause := 100 * time.Millisecond
		to := fmt.Sprintf("%s.20260102-%06d", w.log, done)
		if err := os.Rename(w.log, to); err == nil {
			if err := w.n.reopen(t, w.id); err == nil {
				done++
			} else if err := os.Rename(to, w.log); err != nil {
				// The daemon or the engine is stopped: the kubelet renames the file back.
				t.Error(err)
			} else { // retry soon, to rotate just after the restart
				pause = 5 * time.Millisecond
			}
		}

		time.Sleep(pause)
	}
}

// TestNoLineIsLost runs a container that writes 1,000,000 numbered lines. Meanwhile the log-driver
// process and the daemon are killed 20 times each, the log is rotated continuously, and the engine
// restarts. The log must have all lines once and in order. The engine is stopped only while the
// container pauses, because lines in the engine's memory are lost with any log driver. The
// container continues while the engine is stopped.
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

				// In earlier rounds the log-driver process is killed before it notices the stop of
				// the engine.
				if i > 10 {
					eventually(t, "log-driver process without FIFOs", func() bool {
						fifos, err := os.ReadDir(n.eng.Path("/run/docker/logging"))
						return err == nil && len(fifos) == 0
					})
				}

				w.release(t)
			}

			before := n.driverPID(t)
			n.killDriver(t)
			if i%2 == 0 {
				eventually(t, "restart of the log-driver process", func() bool {
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
			t.Error("the container did not exit within a minute")
		}

		assertNumbers(t, w.last, logFiles(t, w.log)...)
	})
}

// assertNumbers checks that logs hold the numbers from 1 to last, each once and in order.
func assertNumbers(t *testing.T, last int, files ...string) {
	t.Helper()
	want := 1
	for _, r := range readRecords(t, files...) {
		got, err := strconv.Atoi(strings.TrimPrefix(r, "stdout F "))
		if err != nil || got != want {
			t.Errorf("record %q after line %d of %d", r, want-1, last)
			want = got
		}
		want++
	}

	if want != last+1 {
		t.Errorf("last line %d, want %d", want-1, last)
	}
}
