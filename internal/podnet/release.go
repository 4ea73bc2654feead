package podnet

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

const (
	// ReleaseDeadline bounds one release of a pod's network for all of its callers. Plugins whose
	// agent is away take most of a minute, each.
	ReleaseDeadline = 5 * time.Minute
	// releaseMargin is the part of a caller's time that is kept for what comes after the release.
	releaseMargin = time.Second
	// patientCallers is how many callers may give up on one release before its pod goes without it:
	// kubeadm reset waits 2 s, five times, and never comes back.
	patientCallers = 2
)

// errInUse is the result of a release that found its pod running.
var errInUse = errors.New("the pod runs")

// lateError says that a caller did not wait for the end of a release, which goes on.
type lateError struct {
	callers int // that have not waited, this one among them
	err     error
}

func (e *lateError) Error() string {
	return "its network is still being released, which goes on: " + e.err.Error()
}

func (e *lateError) Unwrap() error { return e.err }

// releases are the networks that are being released, by sandbox ID. A release goes on when its
// caller gives up, and all callers wait for the same one.
type releases struct {
	mu      sync.Mutex
	running map[model.ContainerID]*oneRelease
}

type oneRelease struct {
	done    chan struct{}
	err     error // set before done is closed
	givenUp int   // callers that did not wait to the end; under releases.mu
}

// join returns the result of the release of a sandbox's network, and starts it with do if none
// runs. It returns a *lateError a little before ctx's deadline.
func (r *releases) join(ctx context.Context, id model.ContainerID, do func(context.Context) error) error {
	wait, cancel := beforeDeadline(ctx)
	defer cancel()

	one := r.begin(ctx, id, do)
	select {
	case <-one.done:
		return one.err
	case <-wait.Done():
	}

	r.mu.Lock()
	defer r.mu.Unlock()

	one.givenUp++

	return &lateError{one.givenUp, wait.Err()}
}

// isRunning says whether a sandbox's network is being released.
func (r *releases) isRunning(id model.ContainerID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running[id] != nil
}

func (r *releases) begin(ctx context.Context, id model.ContainerID, do func(context.Context) error) *oneRelease {
	r.mu.Lock()
	defer r.mu.Unlock()

	if one := r.running[id]; one != nil {
		return one
	}

	one := &oneRelease{done: make(chan struct{})}
	if r.running == nil {
		r.running = map[model.ContainerID]*oneRelease{}
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

// beforeDeadline ends with ctx, or so early that something can still be done within its deadline.
func beforeDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return ctx, func() {}
	}
	margin := min(releaseMargin, time.Until(deadline)/2)
	return context.WithDeadline(ctx, deadline.Add(-margin))
}

// Disconnect releases the network of a pod and then its namespace. It is idempotent, and needs no
// running pause. A network that cannot be released for long does not hold up the pod: Disconnect
// returns nil, and Leftovers reports the rest for Reclaim.
func (m *Manager) Disconnect(ctx context.Context, sb *spec.Sandbox) error {
	err := errInUse
	for errors.Is(err, errInUse) { // from Reclaim, which spares running pods
		err = m.releases.join(ctx, sb.ID, func(ctx context.Context) error {
			unlock, err := m.lock(ctx, sb.ID)
			if err != nil {
				return err
			}
			defer unlock()
			return m.releaseOrOwe(ctx, sb)
		})
	}

	var late *lateError
	if !errors.As(err, &late) {
		return err
	}

	// Waiting in vain counts as a failure. What has been released meanwhile is no debt.
	isOver := m.debts.fail(sb.ID, m.now())
	if late.callers > patientCallers && !isOver {
		m.debts.owe(sb.ID, m.now())
		isOver = true
	}

	if !m.releases.isRunning(sb.ID) && !m.Holds(sb.ID) {
		m.debts.pay(sb.ID)
	}
	if !isOver || ctx.Err() != nil {
		return fmt.Errorf("sandbox %s: %w", sb.ID, err)
	}

	m.log.Warn("the pod goes before its network, which is still being released", "sandbox", sb.ID)

	return nil
}

// releaseOrOwe releases a network. It returns nil if that fails and the pod has waited long enough.
func (m *Manager) releaseOrOwe(ctx context.Context, sb *spec.Sandbox) error {
	err := m.release(ctx, sb)
	if err == nil {
		return nil
	}

	var owed *OwedError
	if errors.As(err, &owed) {
		m.debts.owe(sb.ID, m.now())
	}

	if !m.debts.fail(sb.ID, m.now()) {
		return err
	}

	m.log.Warn("the pod goes before its network, which is released as soon as its plugins do so",
		"sandbox", sb.ID, "err", err)

	return nil
}

// release disconnects a pod and releases its namespace and what an older shim noted of it. The
// caller holds the lock of the network.
func (m *Manager) release(ctx context.Context, sb *spec.Sandbox) error {
	p, isOurs := m.released(sb)
	if isOurs && m.ConnectsPods() {
		if err := m.connector.Del(ctx, p); err != nil {
			return err
		}
	}

	m.debts.pay(sb.ID)

	return errors.Join(m.pins.Unpin(sb.ID), m.checkpoints.Remove(sb.ID))
}

// released returns the pod to disconnect, with what an older shim noted of it, and whether its
// network is one of a Connector.
func (m *Manager) released(sb *spec.Sandbox) (p Pod, isOurs bool) {
	p = m.pod(sb)
	p.Foreign, p.Ports = sb.Foreign, sb.EnginePorts
	// an older shim's pod; the pause may be dead, and its PID another's
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
		m.log.Warn("an older shim's note of a pod cannot be read; the pod's network is released without it",
			"sandbox", sb.ID, "err", err)
	}

	return p, !sb.HostNetwork() && !sb.EngineNetwork() && !c.HostNetwork
}
