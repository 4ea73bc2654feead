package sandbox

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// buildPause returns a root directory with a static program that runs until a signal ends it.
func buildPause(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	source := filepath.Join(t.TempDir(), "main.go")
	const program = "package main\n\nimport \"syscall\"\n\nfunc main() { _ = syscall.Pause() }\n"
	if err := os.WriteFile(source, []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command("go", "build", "-o", filepath.Join(root, "pause"), source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	return root
}

// awaitKilled checks that a child was killed, and reaps it.
func awaitKilled(t *testing.T, pid int) {
	t.Helper()
	var status unix.WaitStatus
	for {
		got, err := unix.Wait4(pid, &status, unix.WNOHANG, nil)
		if err == unix.EINTR { //nolint:errorlint // of a system call
			continue
		}
		if err != nil || got != pid || status.Signal() != unix.SIGKILL {
			t.Errorf("process %d runs, or ended with status %v, %v", pid, status, err)
		}
		return
	}
}

// TestCleanKillsUnrecordedPause checks a bundle as its server leaves it if it is killed between the
// fork of the pause and the record of its PID.
func TestCleanKillsUnrecordedPause(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cri-dockerd-test-unrecorded")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}

	plan := &Plan{
		root:   buildPause(t),
		args:   []string{"/pause"},
		flags:  unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		cgroup: "/" + filepath.Base(dir),
	}
	g, err := newGroup(plan.cgroup, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.remove(context.Background()) })

	if err := writeState(dir, state{Cgroup: plan.cgroup}); err != nil {
		t.Fatal(err)
	}

	pid, err := plan.fork(g, []string{mark(dir)}, [3]uintptr{0, 1, 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) })

	if _, _, err := Clean(t.Context(), dir); err != nil {
		t.Fatal(err)
	}

	awaitKilled(t, pid)
	if _, err := findGroup(plan.cgroup); !os.IsNotExist(err) {
		t.Errorf("the control group remains: %v", err)
	}
}

// TestKillGroup checks that everything in the group of a pause is killed, also without its mark.
func TestKillGroup(t *testing.T) {
	g, err := newGroup("/cri-dockerd-test-group", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.remove(context.Background()) })

	var pids []int
	for range 2 {
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		if err := g.add(t.Context(), cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		pids = append(pids, cmd.Process.Pid)
	}

	if err := killGroup(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		awaitKilled(t, pid)
	}
}

// TestKillMarked checks that the mark finds the pause of one bundle alone, outside of any group.
func TestKillMarked(t *testing.T) {
	own, other := exec.Command("sleep", "1000"), exec.Command("sleep", "1000")
	for cmd, dir := range map[*exec.Cmd]string{own: "/run/a/own", other: "/run/a/own2"} {
		cmd.Env = []string{"A=" + mark("/run/a/own"), mark(dir)}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
	}

	if err := (state{Cgroup: "/cri-dockerd-test-missing"}).kill(t.Context(), "/run/b/own"); err != nil {
		t.Fatal(err)
	}
	awaitKilled(t, own.Process.Pid)
	if err := other.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the process of another bundle was killed: %v", err)
	}
}
