package cri

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/spec"
)

const (
	joinDeadline = 5 * time.Second // the pause joins within microseconds of its start
	joinInterval = time.Millisecond
)

// How long the engine makes pods' network namespaces after a pause did not join one of ours. It
// doubles with each failure in a row.
const (
	fallBackFirst = time.Minute
	fallBackMost  = time.Hour
)

// maxJoinFailures is how many pauses in a row may fail to join, where earlier ones did, before pods
// get namespaces of the engine's instead of an error.
const maxJoinFailures = 3

// joining is what is known of whether pauses can join namespaces of ours here. Whether they can is
// seen from pods only: one that joins proves it; one that does not, on a node where the engine's
// own way works, has the engine make the namespaces for a while.
type joining struct {
	configured string        // why the engine always makes the namespaces, "" if it need not
	timeout    time.Duration // of a pause that has started and not joined

	mu       sync.Mutex
	proven   bool          // a pause has joined
	failures int           // in a row since then
	problem  string        // why the engine makes the namespaces for now, "" while we do
	until    time.Time     // when the next pod tries ours
	pause    time.Duration // the one before until
}

// reason says why the engine makes namespaces, "" while we do.
func (j *joining) reason() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.configured != "" {
		return j.configured
	}
	return j.problem
}

// try says whether a pod is to get a namespace of ours. While the engine makes them, that is one
// pod after each pause.
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

	j.until = now.Add(max(j.pause, fallBackFirst))

	return true
}

// isTrusted counts a failure, and says whether it is to fail the pod: pauses do join here.
func (j *joining) isTrusted() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.failures++
	return j.proven && j.failures < maxJoinFailures
}

// fallBack notes that the engine's way has worked where ours did not, and returns until when the
// engine makes the namespaces.
func (j *joining) fallBack(problem string, now time.Time) (until time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pause = min(max(2*j.pause, fallBackFirst), fallBackMost)
	j.problem, j.proven, j.until = problem, false, now.Add(j.pause)
	return j.until
}

// succeeded notes a pause that has joined.
func (j *joining) succeeded() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.proven, j.failures, j.problem, j.pause = true, 0, "", 0
}

// retry has the next pod try, since the engine may be another one now.
func (j *joining) retry() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.until, j.pause = time.Time{}, 0
}

// joinError is an error of a step at which the engine may refuse a namespace of ours.
type joinError struct{ err error }

func (e *joinError) Error() string { return e.err.Error() }
func (e *joinError) Unwrap() error { return e.err }

// asJoinError marks an error of the engine: it may not see our mounts, or not permit them.
func asJoinError(err error) error {
	if err == nil || errdefs.IsAlreadyExists(err) || errdefs.IsConflict(err) || errdefs.IsNotFound(err) {
		return err
	}
	return &joinError{err}
}

// awaitJoined waits until a pause has joined its namespace.
func (s *Service) awaitJoined(ctx context.Context, sb *spec.Sandbox) error {
	tick := time.NewTicker(joinInterval)
	defer tick.Stop()

	for deadline := time.Now().Add(s.joining.timeout); !s.Network.HasJoined(sb.ID, sb.Pid); {
		if time.Now().After(deadline) {
			return &joinError{fmt.Errorf("the pause process did not join the pod's network namespace within %v: %w",
				s.joining.timeout, errdefs.ErrUnavailable)}
		}

		if now, err := s.View.Sandbox(string(sb.ID)); err == nil && !now.Running {
			return ended(now)
		}

		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}

	return nil
}

// ended is the error of a pause that ended at once. The exit code of the embedded one says what it
// could not do (engine/pause/src).
func ended(sb *spec.Sandbox) error {
	why := fmt.Sprintf("exit code %d", sb.ExitCode)
	switch {
	case !sb.OwnNetNS:
		return fmt.Errorf("the pause process ended at once (%s): %w", why, errdefs.ErrUnavailable)
	case sb.ExitCode == 200:
		why = "it could not give up its privileges"
	case sb.ExitCode > 100:
		why = "open its network namespace: " + syscall.Errno(sb.ExitCode-100).Error()
	case sb.ExitCode > 0:
		why = "setns: " + syscall.Errno(sb.ExitCode).Error()
	}

	return &joinError{fmt.Errorf("the pause process could not join the pod's network namespace (%s): %w",
		why, errdefs.ErrUnavailable)}
}
