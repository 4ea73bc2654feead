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
	"cri-dockerd/internal/spec"
)

// The engine may start a container after StartContainer has given up, or while the daemon is down.
// Somebody may start one again (docker restart), in a control group without its limits.

const (
	completeRetryMin = time.Second
	completeRetryMax = time.Minute
)

// starts are the containers whose start is being completed.
type starts struct {
	mu      sync.Mutex                 // guards the rest
	running map[model.ContainerID]bool // true: it has started again meanwhile
	// StartContainer has given up, the engine may start it yet; true: it is to be stopped then
	late map[model.ContainerID]bool
}

// outlasts notes a start that the engine may carry out after the call.
func (st *starts) outlasts(id model.ContainerID) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.late[id] = false
}

// stop notes that a container is to be stopped if the engine starts it after all.
func (st *starts) stop(id model.ContainerID) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if _, late := st.late[id]; late {
		st.late[id] = true
	}
}

// isLate says whether outlasts was called, and stop after it.
func (st *starts) isLate(id model.ContainerID) (late, stopped bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	stopped, late = st.late[id]
	return late, stopped
}

// forget ends what outlasts began.
func (st *starts) forget(id model.ContainerID) {
	st.mu.Lock()
	defer st.mu.Unlock()
	delete(st.late, id)
}

// begin says whether the caller is to complete a start. If another is at it, that one does so once
// more.
func (st *starts) begin(id model.ContainerID) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	_, busy := st.running[id]
	st.running[id] = busy
	return !busy
}

// end says whether the caller has completed all starts.
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

// completer completes the starts of containers that StartContainer did not.
type completer struct{ *Service }

// CompleteStarts does for every container that the view sees start what StartContainer does after
// the engine's answer, until ctx or the view ends. What StartContainer has done already is not done
// again. It also requests a recovery for every sandbox that was removed without us.
func (s *Service) CompleteStarts(ctx context.Context) {
	c := completer{s}
	var g errgroup.Group
	defer func() { _ = g.Wait() }()

	for {
		err := c.followStarts(ctx, func(id model.ContainerID) {
			if c.hasNothingToComplete(id) || !s.starts.begin(id) {
				return
			}
			g.Go(func() error { c.completeStarts(ctx, id); return nil })
		})
		if ctx.Err() != nil || errdefs.IsUnavailable(err) {
			return
		}

		s.Log.Warn("starts of containers were missed; all containers are checked", "err", err)
		s.Reclaimer.RequestReclaim() // removals were missed as well
	}
}

// followStarts calls started for every container that runs, and for each that starts.
func (s completer) followStarts(ctx context.Context, started func(id model.ContainerID)) error {
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
			s.starts.forget(change.ID)
			recovery(s).observeRemoval(change.ID)
		}
	}
}

// hasNothingToComplete says so of a sandbox, and of a container that does not run.
func (s completer) hasNothingToComplete(id model.ContainerID) bool {
	c, err := s.View.Container(string(id))
	return err != nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING
}

// completeStarts completes the starts of one container. It tries again until the container has what
// it needs, or does not run.
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

		s.Log.Warn("the start of a container is not complete", "container", id, "retry", pause, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// completeStart finishes the start of a container that runs. An error means that it is to be done
// again.
func (s completer) completeStart(ctx context.Context, id model.ContainerID) error {
	ctx, cancel := context.WithTimeout(ctx, undoDeadline)
	defer cancel()

	c, err := s.lockContainer(ctx, string(id)) // a StartContainer that is under way finishes it by itself
	if err != nil {
		return notFoundIsFine(err)
	}
	defer c.unlock()

	if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING && (c.Pid == 0 || c.Stale) { // an event says no more
		if err := s.renew(ctx, c); err != nil {
			return notFoundIsFine(err)
		}
	}

	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil
	}
	if err := s.finishStart(ctx, c, s.mayNotRun(c.Container)); err != nil {
		return err
	}

	s.starts.forget(id)

	return nil
}

// mayNotRun is why a container that runs is to be killed, nil if it is not.
func (s completer) mayNotRun(c *spec.Container) error {
	late, stopped := s.starts.isLate(c.ID)
	if stopped {
		return fmt.Errorf("container %s was stopped before it was started: %w", c.ID, errdefs.ErrFailedPrecondition)
	}

	if late {
		_, err := s.runningSandbox(string(c.SandboxID))
		return err
	}

	return s.startedAfterStop(c)
}

// startedAfterStop is why a container may not run: its pod was stopped before it started. Of a pod
// whose pause has ended after that, the kubelet ends the containers in their own time.
func (g *gate) startedAfterStop(c *spec.Container) error {
	sb, err := g.view.Sandbox(string(c.SandboxID))
	if err != nil || sb.Running || sb.FinishedAt.IsZero() || !c.StartedAt.After(sb.FinishedAt) {
		return nil //nolint:nilerr // of a pod without a pause nobody knows when it was stopped
	}
	return fmt.Errorf("container %s was started after its sandbox %s had stopped: %w", c.ID, sb.ID,
		errdefs.ErrFailedPrecondition)
}
