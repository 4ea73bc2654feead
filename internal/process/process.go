// Package process handles this process's surroundings: directory locks, signals, messages to
// systemd, and the memory of its own program.
package process

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// HandOverTimeout is the time to wait for an earlier process to release its lock. When a process is
// killed, a plugin or log-driver process it was starting inherits the lock and holds it for a
// moment longer.
const HandOverTimeout = 2 * time.Second

// lockInterval is the pause between two attempts to lock a directory.
const lockInterval = 10 * time.Millisecond

// LockDirectory locks the directory of a flag for this process. It waits up to timeout for another
// process to end. The lock ends with unlock or with the process. Errors name the flag.
func LockDirectory(flag, dir string, timeout time.Duration) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}

	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}

	tick := time.NewTicker(lockInterval)
	defer tick.Stop()

	for deadline := time.Now().Add(timeout); ; <-tick.C {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) || !time.Now().Before(deadline) {
			break
		}
	}

	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = errors.New("another cri-dockerd is using it; stop that one, or give this one a directory of its own")
	}

	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s %s: %w", flag, dir, err), f.Close())
	}

	return func() { f.Close() }, nil
}

// Absorb makes signals harmless until stop is called. SIGHUP arrives when a terminal closes.
// SIGPIPE arrives when journald restarts, because journald reads standard error. The signals are
// not ignored, since plugins would inherit that.
func Absorb(signals ...os.Signal) (stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, signals...)
	return func() { signal.Stop(c) }
}

// DropProgramPages releases the program's pages to the kernel. Only the start touches most of them,
// and they are two thirds of the process's memory. They are clean copies of the file, so the kernel
// restores needed pages from the page cache.
func DropProgramPages() error {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}

	maps, err := os.ReadFile("/proc/self/maps") // proc_pid_maps(5)
	if err != nil {
		return err
	}

	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		if len(f) < 6 || f[5] != strings.TrimSuffix(self, " (deleted)") {
			continue
		}
		if strings.Contains(f[1], "w") { // written pages have no other copy
			continue
		}

		var from, to uintptr
		if _, err := fmt.Sscanf(f[0], "%x-%x", &from, &to); err != nil {
			return err
		}

		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); errno != 0 {
			return errno
		}
	}

	return nil
}
