package process

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestLockDirectory expects the second lock to fail at once without a timeout, to wait with one,
// and to name the flag in its error.
func TestLockDirectory(t *testing.T) {
	dir := t.TempDir()
	unlock, err := LockDirectory("--flag", dir, 0)
	if err != nil {
		t.Fatal(err)
	}

	if _, err := LockDirectory("--flag", dir, 0); err == nil || !strings.Contains(err.Error(), "--flag "+dir+
		": another cri-dockerd") {
		t.Errorf("second lock: got error %v, want one that names the flag", err)
	}

	time.AfterFunc(50*time.Millisecond, unlock)
	second, err := LockDirectory("--flag", dir, 20*time.Second)
	if err != nil {
		t.Fatalf("lock while the first holder ends: %v", err)
	}

	second()
	if _, err := LockDirectory("--flag", "/proc/nonexistent", 0); err == nil ||
		!strings.Contains(err.Error(), "--flag") {
		t.Errorf("directory that cannot be created: got error %v, want one that names the flag", err)
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
		t.Errorf("environment without systemd: %q", got)
	}
}

func TestDropProgramPages(t *testing.T) {
	if err := DropProgramPages(); err != nil {
		t.Error(err)
	}
}
