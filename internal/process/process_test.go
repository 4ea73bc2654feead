package process

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestLockDirectory: the second lock fails at once without a timeout, waits with one, and names the
// flag.
func TestLockDirectory(t *testing.T) {
	dir := t.TempDir()
	unlock, err := LockDirectory("--flag", dir, 0)
	if err != nil {
		t.Fatal(err)
	}

	if _, err := LockDirectory("--flag", dir, 0); err == nil || !strings.Contains(err.Error(), "--flag "+dir+
		": another cri-dockerd") {
		t.Errorf("a second lock: %v", err)
	}

	time.AfterFunc(50*time.Millisecond, unlock)
	second, err := LockDirectory("--flag", dir, 20*time.Second)
	if err != nil {
		t.Fatalf("while the first one ends: %v", err)
	}

	second()
	if _, err := LockDirectory("--flag", "/proc/nonexistent", 0); err == nil ||
		!strings.Contains(err.Error(), "--flag") {
		t.Errorf("a directory that cannot be made: %v", err)
	}
}

func TestAbsorb(t *testing.T) {
	stop := Absorb(syscall.SIGUSR1)
	defer stop()
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGUSR1); err != nil { // would end this process
		t.Fatal(err)
	}
}

func TestEnvironWithoutSystemd(t *testing.T) {
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS",
		"KEPT"} {
		t.Setenv(name, "1")
	}

	got := EnvironWithoutSystemd()
	if !slices.Contains(got, "KEPT=1") || slices.ContainsFunc(got, func(v string) bool {
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "WATCHDOG_") ||
			strings.HasPrefix(v, "LISTEN_")
	}) {
		t.Errorf("%q", got)
	}
}

func TestDropProgramPages(t *testing.T) {
	if err := DropProgramPages(); err != nil {
		t.Error(err)
	}
}
