package proc

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// keepsExitCodes reports whether the kernel keeps the exit code of a reaped process (Linux 6.15).
func keepsExitCodes(t *testing.T) bool {
	t.Helper()
	pid, end := child(t, "exit 1")
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)

	end()
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}

	return unix.IoctlPidfdInfo(fd, &info) == nil && info.Mask&unix.PIDFD_INFO_EXIT != 0
}

// ownGroup returns a part of the path of this program's control group. Tests use it in place of a
// container's ID.
func ownGroup(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return line
}

// runExits runs an Exits until the test ends.
func runExits(t *testing.T) *Exits {
	t.Helper()
	x, err := NewExits(Host())
	if err != nil {
		t.Fatal(err)
	}

	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- x.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		<-ended
		if n := pidfds(t); n > 0 {
			t.Errorf("%d pidfds are still open", n)
		}
	})

	return x
}

// pidfds counts the pidfds of this program.
func pidfds(t *testing.T) (n int) {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}

	for _, f := range names {
		to, err := os.Readlink(filepath.Join("/proc/self/fd", f.Name()))
		if err == nil && strings.Contains(to, "pidfd") {
			n++
		}
	}

	return n
}

func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out after 20 s: %s", what)
		}
	}
}

// child starts a shell and runs line in it once end is called. end returns after the shell is
// reaped. (Package os/exec would hold its own pidfd.)
func child(t *testing.T, line string) (pid int, end func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()

	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()

	pid, err = syscall.ForkExec("/bin/sh", []string{"sh", "-c", "read go; " + line}, &syscall.ProcAttr{
		Files: []uintptr{r.Fd(), null.Fd(), null.Fd()},
	})
	if err != nil {
		t.Fatal(err)
	}

	end = sync.OnceFunc(func() {
		w.Close()
		if _, err := syscall.Wait4(pid, nil, 0, nil); err != nil {
			t.Error(err)
		}
	})

	t.Cleanup(end)

	return pid, end
}

// awaitEnd waits until the exit of the watched process is recorded, and checks its exit code.
func (x *Exits) awaitEnd(t *testing.T, container string, want int, kept bool) {
	t.Helper()
	await(t, "the exit is recorded", func() bool {
		_, _, known := x.Exit(container)
		return pidfds(t) == 0 && (known || !kept)
	})

	code, ended, ok := x.Exit(container)
	if ok != kept || ok && (code != want || time.Since(ended) > time.Minute || ended.After(time.Now())) {
		t.Errorf("exit code %d at %v, known %v, want %d, %v", code, ended, ok, want, kept)
	}
}

// TestExits expects the kernel to report the exit code of a process reaped by another process.
func TestExits(t *testing.T) {
	kept := keepsExitCodes(t)
	for line, want := range map[string]int{
		"exit 0":      0,
		"exit 7":      7,
		"exit 255":    255,
		"kill -9 $$":  137,
		"kill -15 $$": 143,
	} {
		t.Run(line, func(t *testing.T) {
			x, id := runExits(t), ownGroup(t)
			pid, end := child(t, line)
			x.Watch(id, pid)
			await(t, "the process is watched", func() bool { return pidfds(t) == 1 })
			if _, _, ok := x.Exit(id); ok {
				t.Error("a running process has an exit code")
			}

			end()
			x.awaitEnd(t, id, want, kept)
			x.Forget(id)
			if _, _, ok := x.Exit(id); ok {
				t.Error("a forgotten container has an exit code")
			}
		})
	}
}

// TestReadExitWhileReaped expects no read to fail while the process is being reaped, if the kernel
// keeps exit codes.
func TestReadExitWhileReaped(t *testing.T) {
	kept := keepsExitCodes(t)
	for range 500 {
		pid, end := child(t, "exit 7")
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}

		go end()
		code, known := 0, false
		for !known && err == nil {
			code, known, err = readExit(fd)
		}

		end()
		unix.Close(fd)
		if known != kept || kept && code != 7 {
			t.Fatalf("exit code %d, known %v, want 7, %v: %v", code, known, kept, err)
		}
	}
}

// TestExitsOfOthers expects a process outside the container's control group never to be watched,
// whatever its PID.
func TestExitsOfOthers(t *testing.T) {
	kept := keepsExitCodes(t)
	x, id := runExits(t), ownGroup(t)
	foreign, endForeign := child(t, "exit 3")
	own, endOwn := child(t, "exit 4")
	x.Watch("another container", foreign)
	x.Watch("", foreign)
	x.Watch(id, own)
	await(t, "one process is watched", func() bool { return pidfds(t) == 1 })
	endForeign()
	endOwn()
	x.awaitEnd(t, id, 4, kept)

	for _, id := range []string{"another container", "", "unknown"} {
		if code, _, ok := x.Exit(id); ok {
			t.Errorf("container %q: exit code %d", id, code)
		}
	}
}

// TestExitsStartAnew expects a new process of the container to replace the old one, and the table
// to be bounded.
func TestExitsStartAnew(t *testing.T) {
	kept := keepsExitCodes(t)
	x, id := runExits(t), ownGroup(t)
	for _, want := range []int{3, 4} {
		pid, end := child(t, "exit "+strconv.Itoa(want))
		x.Watch(id, pid)
		if _, _, ok := x.Exit(id); ok {
			t.Error("the new process has the exit code of an earlier one")
		}

		await(t, "the process is watched", func() bool { return pidfds(t) == 1 })
		end()
		x.awaitEnd(t, id, want, kept)
	}

	for i := range 2 * maxHeld {
		x.Watch(strconv.Itoa(i), 1)
	}

	x.mu.Lock()
	defer x.mu.Unlock()

	if len(x.held) != maxHeld || len(x.numbers) != maxHeld {
		t.Errorf("%d processes and %d numbers in the table, want maxHeld of each", len(x.held), len(x.numbers))
	}
}
