package main

import (
	"bytes"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const amd64 = "../bin/pause-amd64"

// TestEmbeddedBytesAreWhatTheSourceGives fails when either the source or the embedded programs were changed alone: run make pause.
func TestEmbeddedBytesAreWhatTheSourceGives(t *testing.T) {
	for arch, machine := range machines() {
		want, err := program(arch, machine)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile("../bin/pause-" + arch)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the embedded program is not what the source gives; run make pause", arch)
		}
		if len(got) > 4096 {
			t.Errorf("%s: %d bytes", arch, len(got))
		}
	}
}

func TestEndsOnSignals(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		cmd := exec.Command(amd64)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill() })
		waitFor(t, "it waits for signals", func() bool {
			st := procStatus(cmd.Process.Pid)
			return strings.Contains(st, "Name:\tpause-amd64") && strings.Contains(st, "State:\tS")
		})
		if rss := residentKiB(t, procStatus(cmd.Process.Pid)); rss > 64 {
			t.Errorf("it takes %d KiB of memory", rss)
		}
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("on %v: %v", s, err)
		}
	}
}

// TestReapsOrphans runs the program as process 1 of a PID namespace, by a shell that leaves it an orphan.
func TestReapsOrphans(t *testing.T) {
	cmd := exec.Command("sh", "-c", "(sleep 0.05 &) ; exec "+amd64)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	waitFor(t, "the shell became pause", func() bool { return strings.Contains(procStatus(cmd.Process.Pid), "Name:\tpause-amd64") })
	children := func() string {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/task/" + strconv.Itoa(cmd.Process.Pid) + "/children")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	waitFor(t, "the orphan is reaped", func() bool { return children() == "" })
}

func procStatus(pid int) string {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	return string(b)
}

// residentKiB is VmRSS of a /proc/<pid>/status.
func residentKiB(t *testing.T, status string) int {
	t.Helper()
	_, rest, _ := strings.Cut(status, "VmRSS:")
	line, _, _ := strings.Cut(rest, " kB")
	n, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatalf("VmRSS: %v", err)
	}
	return n
}

func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for tick := time.NewTicker(5 * time.Millisecond); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within 5 s: %s", what)
		}
	}
}
