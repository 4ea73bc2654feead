package engines

import (
	"os"
	"path/filepath"
	"syscall"
)

// ShareLimits waits until no test of this machine exhausts the kernel's limits for root, and keeps
// others from it until the test ends. Tests need it if they expect check to find nothing.
func ShareLimits(tb TB) { lockLimits(tb, syscall.LOCK_SH) }

// ExhaustLimits waits until it is the only test with these limits, and keeps them until the test
// ends. The kernel counts pipe pages and inotify instances per user, so that tests of all packages
// share them.
func ExhaustLimits(tb TB) { lockLimits(tb, syscall.LOCK_EX) }

func lockLimits(tb TB, how int) {
	tb.Helper()
	if err := os.MkdirAll(Cache(), 0o755); err != nil {
		tb.Fatalf("lock the kernel's limits: %v", err)
	}

	f, err := os.OpenFile(filepath.Join(Cache(), "kernel-limits.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		tb.Fatalf("lock the kernel's limits: %v", err)
	}

	tb.Cleanup(func() { f.Close() })
	for {
		err = syscall.Flock(int(f.Fd()), how)
		if err != syscall.EINTR { //nolint:errorlint // a plain error number
			break
		}
	}

	if err != nil {
		tb.Fatalf("lock the kernel's limits: %v", err)
	}
}
