package podnet

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

const (
	// ReleaseDeadline limits one release of a pod's network, for all its callers together. A plugin
	// takes most of a minute while its agent is down.
	ReleaseDeadline = 5 * time.Minute
	// releaseMargin is reserved of a caller's deadline for the steps after the release.
	releaseMargin = time.Second
	// maxAbandonedWaits is the number of callers allowed to give up on a release before the pod is
	// removed without it. kubeadm reset waits 2 s, five times, and never retries.
	maxAbandonedWaits = 2
)

// releaser names the reason of a release.
type releaser int

const (
	byReclaim releaser = iota // of a removed pod; it spares a pod that is running or not removed yet
	byRemoval                 // requested by a caller that stops or removes the pod
)

// pendingError reports a caller's timeout while the release continues.
type pendingError struct {
	callers int // number of callers with a timeout, including this one
	err     error
}

func (e *pendingError) Error() string {
	return "its network is still being released in the background: " + e.err.Error()
}

func (e *pendingError) Unwrap() error { return e.err }

// releases holds the running releases by sandbox ID. A release continues after a caller's timeout,
// and all callers share the same one.
type releases struct {
	mu      sync.Mutex
	running map[model.ContainerID]*releaseState
}

type releaseState struct {
	by       releaser
	done     chan struct{}
	err      error // set before done is closed
	timeouts int   // number of callers with a timeout; guarded by releases.mu
}

// join waits for the release of a sandbox's network. If none is running, it starts one with do. A
// removal never takes the result of Reclaim, which may have spared the pod: it starts its own
// release afterwards. join returns a *pendingError shortly before ctx's deadline.
func (r *releases) join(
	ctx context.Context, id model.ContainerID, by releaser, do func(context.Context) error,
) error {
	wait, cancel := beforeDeadline(ctx)
	defer cancel()

	one := r.begin(ctx, id, by, do)
	for {
		select {
		case <-one.done:
			if by == byReclaim || one.by == byRemoval {
				return one.err
			}
			one = r.begin(ctx, id, by, do)

		case <-wait.Done():
			return r.abandon(one, wait.Err())
		}
	}
}

// abandon counts a caller with a timeout.
func (r *releases) abandon(one *releaseState, err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()

	one.timeouts++

	return &pendingError{one.timeouts, err}
}

// isRunning reports whether a sandbox's network is being released.
func (r *releases) isRunning(id model.ContainerID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running[id] != nil
}

func (r *releases) begin(
	ctx context.Context, id model.ContainerID, by releaser, do func(context.Context) error,
) *releaseState {
	r.mu.Lock()
	defer r.mu.Unlock()

	if one := r.running[id]; one != nil {
		return one
	}

	one := &releaseState{by: by, done: make(chan struct{})}
	if r.running == nil {
		r.running = map[model.ContainerID]*releaseState{}
	}

	r.running[id] = one
	go func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ReleaseDeadline)
		defer cancel()
		one.err = do(ctx)
		r.mu.Lock()
		delete(r.running, id)
		r.mu.Unlock()
		close(one.done)
	}()

	return one
}

// beforeDeadline returns a context with a slightly earlier deadline than ctx, for steps after the
// wait.
func beforeDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return ctx, func() {}
	}
	margin := min(releaseMargin, time.Until(deadline)/2)
	return context.WithDeadline(ctx, deadline.Add(-margin))
}

// Disconnect releases the network of a pod and then its namespace. It is idempotent and does not
// need a running pause process. A failing release does not delay the pod's removal for long:
// Disconnect then returns nil, and Leftovers requests a Reclaim.
func (m *Manager) Disconnect(ctx context.Context, sb *model.Sandbox) error {
	err := m.releases.join(ctx, sb.ID, byRemoval, func(ctx context.Context) error {
		unlock, err := m.lock(ctx, sb.ID)
		if err != nil {
			return err
		}
		defer unlock()
		return m.releaseOrDefer(ctx, sb)
	})

	var pending *pendingError
	if !errors.As(err, &pending) {
		return err
	}

	// A timeout counts as a failure, unless the release has completed since.
	isOver := m.backlog.recordFailure(sb.ID, m.now())
	if pending.callers > maxAbandonedWaits && !isOver {
		m.backlog.expire(sb.ID, m.now())
		isOver = true
	}

	if !m.releases.isRunning(sb.ID) && !m.Holds(sb.ID) {
		m.backlog.remove(sb.ID)
	}
	if !isOver || ctx.Err() != nil {
		return fmt.Errorf("sandbox %s: %w", sb.ID, err)
	}

	m.log.Warn("removing the pod before its network; the release continues", "sandbox", sb.ID)

	return nil
}

// releaseOrDefer releases a network. If this fails, it returns nil after maxRemovalDelay.
func (m *Manager) releaseOrDefer(ctx context.Context, sb *model.Sandbox) error {
	err := m.releaseLocked(ctx, sb)
	if err == nil {
		return nil
	}

	var missing *MissingPluginError
	if errors.As(err, &missing) {
		m.backlog.expire(sb.ID, m.now())
	}

	if !m.backlog.recordFailure(sb.ID, m.now()) {
		return err
	}

	m.log.Warn("removing the pod before its network; the release is retried until its plugins succeed",
		"sandbox", sb.ID, "err", err)

	return nil
}

// releaseLocked disconnects a pod and releases its namespace and the checkpoint of an older shim.
func (m *Manager) releaseLocked(ctx context.Context, sb *model.Sandbox) error {
	p, isOurs := m.podToRelease(sb)
	if isOurs && m.ConnectsPods() {
		if err := m.connector.Del(ctx, p); err != nil {
			return err
		}
	}

	m.backlog.remove(sb.ID)

	return errors.Join(m.pins.Unpin(sb.ID), m.checkpoints.Remove(sb.ID))
}

// podToRelease returns the pod to disconnect, including data of an older shim's checkpoint. isOurs
// reports whether a Connector owns its network.
func (m *Manager) podToRelease(sb *model.Sandbox) (p Pod, isOurs bool) {
	p = m.pod(sb)
	p.Foreign, p.Ports = sb.Foreign, sb.EnginePorts
	// An older shim's pod may have no pin yet. Its pause process may have exited, and the PID be
	// reused.
	if p.NetNS == "" && sb.Pid != 0 && !sb.Restarted {
		if pin, err := m.pins.Pin(sb.ID, sb.Pid); err == nil {
			p.NetNS = pin
		}
	}

	c, err := m.checkpoints.Read(sb.ID)
	switch {
	case err == nil:
		p.Ports = c.Ports
		if sb.Metadata == nil { // its container is removed
			p.Name, p.Namespace, p.Foreign = c.Name, c.Namespace, true
		}

	case errdefs.IsNotFound(err):
	default:
		p.Foreign = true
		m.log.Warn("cannot read the checkpoint of an older shim; releasing the pod's network without it",
			"sandbox", sb.ID, "err", err)
	}

	return p, !sb.HostNetwork() && !sb.EngineNetwork() && !c.HostNetwork
}
