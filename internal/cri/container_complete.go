package cri

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// The engine may start a container after StartContainer has failed, or while the daemon is down. An
// operator may restart one (docker restart), and its new cgroup lacks the limits.

const (
	completeRetryMin = time.Second
	completeRetryMax = time.Minute
)

// starts tracks the containers whose start is being completed.
type starts struct {
	mu      sync.Mutex                 // guards the maps
	running map[model.ContainerID]bool // true: the container has started again meanwhile
	// StartContainer has failed, but the engine may still start the container; true: stop it then
	late map[model.ContainerID]bool
}

// markLate records that the engine may still carry out a start after the call.
func (st *starts) markLate(id model.ContainerID) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.late[id] = false
}

// markStopped requests a stop of the container if the engine starts it after all.
func (st *starts) markStopped(id model.ContainerID) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if _, late := st.late[id]; late {
		st.late[id] = true
	}
}

// isLate reports whether the start is marked late, and whether it is marked stopped.
func (st *starts) isLate(id model.ContainerID) (late, stopped bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	stopped, late = st.late[id]
	return late, stopped
}

// forget undoes markLate.
func (st *starts) forget(id model.ContainerID) {
	st.mu.Lock()
	defer st.mu.Unlock()
	delete(st.late, id)
}

// begin reports whether the caller should complete a start. If another goroutine is already
// completing one, that goroutine repeats its work instead.
func (st *starts) begin(id model.ContainerID) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	_, busy := st.running[id]
	st.running[id] = busy
	return !busy
}

// end reports whether the caller has completed all starts.
func (st *starts) end(id model.ContainerID) bool {
	st.mu.Lock()
	defer st.mu.Unlock()

	if st.running[id] {
		st.running[id] = false
		return false
	}

	delete(st.running, id)

	return true
}

// completer completes container starts that StartContainer has not finished.
type completer struct{ *Service }

// CompleteStarts finishes every observed container start as StartContainer does after a successful
// engine call. It skips steps already done, and runs until ctx or the view ends. It also releases
// the network of every sandbox removed by someone else.
func (s *Service) CompleteStarts(ctx context.Context) {
	c := completer{s}
	var g, removals errgroup.Group
	removals.SetLimit(recoveriesAtOnce)
	defer func() { _, _ = g.Wait(), removals.Wait() }()

	started := func(id model.ContainerID) {
		if c.hasNothingToComplete(id) || !s.starts.begin(id) {
			return
		}
		g.Go(func() error { c.completeStarts(ctx, id); return nil })
	}
	removed := func(id model.ContainerID) {
		s.starts.forget(id)
		recovery{s}.observeRemoval(ctx, &removals, id)
	}

	for {
		err := c.follow(ctx, started, removed)
		if ctx.Err() != nil || errdefs.IsUnavailable(err) {
			return
		}

		s.Log.Warn("missed container starts; checking all containers", "err", err)
		s.Reclaimer.RequestReclaim() // removals were missed as well
	}
}

// follow calls started for every container in the view and for each later start, and removed for
// each removed container or sandbox.
func (s completer) follow(ctx context.Context, started, removed func(id model.ContainerID)) error {
	w := s.View.Watch()
	defer w.Stop()

	for _, c := range s.View.Containers() {
		started(c.ID)
	}

	for {
		change, err := w.Next(ctx)
		if err != nil {
			return err
		}

		switch change.Type {
		case runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT:
			started(change.ID)
		case runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT:
			removed(change.ID)
		}
	}
}

// hasNothingToComplete reports whether the object is a sandbox, or a container that is not running.
func (s completer) hasNothingToComplete(id model.ContainerID) bool {
	c, err := s.View.Container(string(id))
	return err != nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING
}

// completeStarts completes the starts of one container. It retries until the container is complete
// or no longer runs.
func (s completer) completeStarts(ctx context.Context, id model.ContainerID) {
	for pause := completeRetryMin; ; pause = min(2*pause, completeRetryMax) {
		err := s.completeStart(ctx, id)
		if err == nil {
			if s.starts.end(id) {
				return
			}
			pause = completeRetryMin
			continue
		}

		s.Log.Warn("failed to complete the start of a container", "container", id, "retry", pause, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// completeStart finishes the start of a running container. The caller retries after an error.
func (s completer) completeStart(ctx context.Context, id model.ContainerID) error {
	ctx, cancel := context.WithTimeout(ctx, undoDeadline)
	defer cancel()

	c, err := s.lockContainer(ctx, string(id)) // waits for a StartContainer in progress
	if err != nil {
		return ignoreNotFound(err)
	}
	defer c.unlock()

	if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING && (c.Pid == 0 || c.Stale) { // an event has no PID
		if err := s.renew(ctx, c); err != nil {
			return ignoreNotFound(err)
		}
	}

	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil
	}
	if err := s.finishStart(ctx, c, s.killReason(c.Container)); err != nil {
		return err
	}

	s.starts.forget(id)
	s.hooks.startedLate(ctx, c.Container)

	return nil
}

// killReason returns the reason to kill a running container, or nil.
func (s completer) killReason(c *model.Container) error {
	late, stopped := s.starts.isLate(c.ID)
	if stopped {
		return fmt.Errorf("container %s was stopped before it was started: %w", c.ID, errdefs.ErrFailedPrecondition)
	}

	if late {
		_, err := s.runningSandbox(string(c.SandboxID))
		return err
	}

	return s.checkPodStop(c)
}

// checkPodStop returns an error if a container started after its pod was stopped. If the pause
// container ended later, the kubelet stops the containers itself.
func (g *gate) checkPodStop(c *model.Container) error {
	sb, err := g.view.Sandbox(string(c.SandboxID))
	if err != nil || sb.Running || sb.FinishedAt.IsZero() || !c.StartedAt.After(sb.FinishedAt) {
		return nil //nolint:nilerr // without a pause container the time of the stop is unknown
	}
	return fmt.Errorf("container %s was started after its sandbox %s had stopped: %w", c.ID, sb.ID,
		errdefs.ErrFailedPrecondition)
}
