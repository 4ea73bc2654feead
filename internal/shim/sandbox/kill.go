package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A server may be killed after the fork of a pause and before the record of its PID. Then the
// pause is in its control group (cgroup v1), or the mark in its environment shows whose it is.

// killTimeout bounds the wait for a killed process. Only one in an uninterruptible wait takes
// longer.
const killTimeout = 10 * time.Second

// maxEnviron bounds the environment of a process that is searched for a mark, in bytes. That of a
// pause has some hundred.
const maxEnviron = 64 << 10

// mark returns the variable in the environment of the pause of a bundle. containerd names a bundle
// after its container.
func mark(dir string) string { return "CRI_DOCKERD_PAUSE=" + filepath.Base(dir) }

// kill kills the pause of the state file in a bundle, and everything else in its control group. It
// waits for their end.
func (s state) kill(ctx context.Context, dir string) error {
	if s.Pid > 0 {
		if err := killProcess(ctx, s.Pid, func() bool { return isStartedAt(s.Pid, s.Start) }); err != nil {
			return err
		}
	} else if err := killMarked(ctx, mark(dir)); err != nil {
		return err
	}

	g, err := findGroup(s.Cgroup)
	if err != nil {
		return ignoreMissing(err)
	}

	return killGroup(ctx, g)
}

// killGroup kills the processes of a control group. It spares processes with this program: a server
// is in the group only while one of its threads starts the pause.
func killGroup(ctx context.Context, g group) error {
	own, err := os.Executable()
	if err != nil {
		return err
	}

	for deadline := time.Now().Add(killTimeout); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		pids, err := g.processes()
		if err != nil || len(pids) == 0 || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}

		for _, pid := range pids {
			if program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && program == own {
				continue
			}

			isMember := func() bool {
				now, err := g.processes()
				return err == nil && slices.Contains(now, pid)
			}
			if err := killProcess(ctx, pid, isMember); err != nil {
				return err
			}
		}
	}

	return fmt.Errorf("the control group is not empty after %v", killTimeout)
}

// killMarked kills the processes with a variable in their environment.
func killMarked(ctx context.Context, variable string) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}

	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !isMarked(pid, variable) {
			continue
		}
		if err := killProcess(ctx, pid, func() bool { return isMarked(pid, variable) }); err != nil {
			return err
		}
	}

	return nil
}

// isMarked reports whether the environment of a process has a variable.
func isMarked(pid int, variable string) bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return false
	}
	defer f.Close()

	text, err := io.ReadAll(io.LimitReader(f, maxEnviron))

	return err == nil && slices.ContainsFunc(bytes.Split(text, []byte{0}), func(v []byte) bool {
		return string(v) == variable
	})
}

// isStartedAt reports whether a process has this start time.
func isStartedAt(pid int, start string) bool {
	got, err := startTime(pid)
	return err == nil && got == start
}

// killProcess kills a process and waits for its end. isWanted decides once a descriptor holds the
// process: its PID cannot get another one then.
func killProcess(ctx context.Context, pid int, isWanted func() bool) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)

	if !isWanted() {
		return nil // it has ended, and perhaps its PID has another process
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}

	return wrap(waitPidfd(ctx, fd), "process %d", pid)
}

// waitPidfd waits for the end of a process (pidfd_open(2)).
func waitPidfd(ctx context.Context, fd int) error {
	const step = 50 * time.Millisecond
	for deadline := time.Now().Add(killTimeout); time.Now().Before(deadline); {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(step.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n > 0:
			return nil
		}

		if ctx.Err() != nil {
			return ctx.Err()
		}
	}

	return fmt.Errorf("it does not end within %v", killTimeout)
}

// awaitEmpty waits until a control group without a process has no thread either. The thread of a
// failed start ends with its goroutine.
func awaitEmpty(g group) error {
	for deadline := time.Now().Add(killTimeout); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if pids, err := g.processes(); err != nil || len(pids) == 0 {
			return err
		}
	}
	return errors.New("a thread remains in the control group")
}
