package cri

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

const (
	joinDeadline = 5 * time.Second // a pause process joins within microseconds of its start
	joinInterval = time.Millisecond
)

// Bounds for the time in which the engine creates network namespaces, after a pause process failed
// to join the daemon's. It doubles with each consecutive failure.
const (
	fallBackMin = time.Minute
	fallBackMax = time.Hour
)

// maxJoinFailures is the number of consecutive failures after which the engine creates the
// namespaces, on a node where earlier pause processes have joined. Fewer failures only fail their
// pods.
const maxJoinFailures = 3

// joining tracks whether pause processes can join network namespaces created by the daemon. Only
// pods can show it: a successful join proves it. After a failed join on a node where the engine's
// way works, the engine creates the namespaces for a while.
type joining struct {
	configured string        // why the engine always creates the namespaces, "" if it need not
	timeout    time.Duration // for a started pause process to join

	mu       sync.Mutex
	proven   bool          // a pause process has joined
	failures int           // consecutive, since then
	problem  string        // why the engine creates the namespaces for now; "" if the daemon does
	until    time.Time     // when the next pod tries the daemon's way
	pause    time.Duration // the interval before until
}

// reason returns why the engine creates namespaces, "" if the daemon does.
func (j *joining) reason() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.configured != "" {
		return j.configured
	}
	return j.problem
}

// try reports whether the daemon should create the namespace of a pod. After a fallback, it lets
// one pod try after each interval.
func (j *joining) try(now time.Time) bool {
	j.mu.Lock()
	defer j.mu.Unlock()

	switch {
	case j.configured != "":
		return false
	case j.problem == "":
		return true
	case now.Before(j.until):
		return false
	}

	j.until = now.Add(max(j.pause, fallBackMin))

	return true
}

// isTrusted counts a failure, and reports whether it should fail the pod because joins work on this
// node.
func (j *joining) isTrusted() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.failures++
	return j.proven && j.failures < maxJoinFailures
}

// fallBack records that the engine's way worked after the daemon's failed. It returns the time
// until which the engine creates the namespaces.
func (j *joining) fallBack(problem string, now time.Time) (until time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pause = min(max(2*j.pause, fallBackMin), fallBackMax)
	j.problem, j.proven, j.until = problem, false, now.Add(j.pause)
	return j.until
}

// succeeded records a successful join.
func (j *joining) succeeded() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.proven, j.failures, j.problem, j.pause = true, 0, "", 0
}

// retry lets the next pod try again, since the engine may have changed.
func (j *joining) retry() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.until, j.pause = time.Time{}, 0
}

// joinError is an error of a step in which the engine may reject the daemon's namespace.
type joinError struct{ err error }

func (e *joinError) Error() string { return e.err.Error() }
func (e *joinError) Unwrap() error { return e.err }

// asJoinError marks an engine error: the engine may not see the daemon's mounts, or not permit
// them.
func asJoinError(err error) error {
	if err == nil || errdefs.IsAlreadyExists(err) || errdefs.IsConflict(err) || errdefs.IsNotFound(err) {
		return err
	}
	return &joinError{err}
}

// awaitJoined waits until the pause process has joined its namespace.
func (s *Service) awaitJoined(ctx context.Context, sb *model.Sandbox) error {
	tick := time.NewTicker(joinInterval)
	defer tick.Stop()

	for deadline := time.Now().Add(s.joining.timeout); !s.Network.HasJoined(sb.ID, sb.Pid); {
		if time.Now().After(deadline) {
			return &joinError{fmt.Errorf("pause process did not join the pod's network namespace within %v: %w",
				s.joining.timeout, errdefs.ErrUnavailable)}
		}

		if now, err := s.View.Sandbox(string(sb.ID)); err == nil && !now.Running {
			return pauseExitError(now)
		}

		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}

	return nil
}

// pauseExitError returns the error for a pause process that exited at once. The exit code of the
// embedded pause encodes the failed step (engine/pause/src).
func pauseExitError(sb *model.Sandbox) error {
	cause := fmt.Sprintf("exit code %d", sb.ExitCode)
	switch {
	case !sb.OwnNetNS:
		return fmt.Errorf("pause process exited at once (%s): %w", cause, errdefs.ErrUnavailable)
	case sb.ExitCode == 200:
		cause = "drop privileges"
	case sb.ExitCode > 100:
		cause = "open its network namespace: " + syscall.Errno(sb.ExitCode-100).Error()
	case sb.ExitCode > 0:
		cause = "setns: " + syscall.Errno(sb.ExitCode).Error()
	}

	return &joinError{fmt.Errorf("pause process could not join the pod's network namespace (%s): %w",
		cause, errdefs.ErrUnavailable)}
}
