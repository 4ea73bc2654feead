package cri

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/spec"
)

const (
	// releaseDeadline bounds one release of a pod's network for all of its callers. Plugins whose agent is
	// away take most of a minute, each.
	releaseDeadline = 5 * time.Minute
	// recoveryWait is how long recovery waits for one pod before it goes on with the next.
	recoveryWait = 30 * time.Second
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

// releases are the networks that are being released, by sandbox ID. A release goes on when its caller
// gives up, and all callers wait for the same one.
type releases struct {
	mu      sync.Mutex
	running map[model.ContainerID]*oneRelease
}

type oneRelease struct {
	done    chan struct{}
	err     error // set before done is closed
	givenUp int   // callers that did not wait to the end; under releases.mu
}

// join returns the result of the release of a sandbox's network, and starts it with do if none runs.
// It returns a *lateError a little before ctx's deadline.
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
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseDeadline)
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

// disconnect releases the pod's network and then its namespace. It is idempotent, and needs no running
// pause. A network that cannot be released for long does not hold the pod up; see debts.
func (s *Service) disconnect(ctx context.Context, sb *spec.Sandbox) error {
	err := errInUse
	for errors.Is(err, errInUse) { // recovery's release, which leaves pods alone that run
		err = s.releases.join(ctx, sb.ID, func(ctx context.Context) error {
			unlock, err := s.lockNetwork(ctx, sb.ID)
			if err != nil {
				return err
			}
			defer unlock()
			return s.releaseOrOwe(ctx, sb)
		})
	}
	var late *lateError
	if !errors.As(err, &late) {
		return err
	}

	// Waiting in vain counts as a failure. What has been released meanwhile is no debt.
	enough := s.debts.failed(string(sb.ID), time.Now())
	if late.callers > patientCallers && !enough {
		s.debts.owe(string(sb.ID), time.Now())
		enough = true
	}
	if !s.releases.isRunning(sb.ID) && !s.holdsNetwork(sb.ID) {
		s.debts.paid(string(sb.ID))
	}
	if !enough || ctx.Err() != nil {
		return fmt.Errorf("sandbox %s: %w", sb.ID, err)
	}
	s.Log.Warn("the pod goes before its network, which is still being released", "sandbox", sb.ID)
	return nil
}

// releaseOrOwe is release, and nil for a network that the pod does not wait for any longer.
func (s *Service) releaseOrOwe(ctx context.Context, sb *spec.Sandbox) error {
	err := s.release(ctx, sb)
	if err == nil {
		return nil
	}
	var owed *podnet.OwedError
	if errors.As(err, &owed) {
		s.debts.owe(string(sb.ID), time.Now())
	}
	if !s.debts.failed(string(sb.ID), time.Now()) {
		return err
	}
	s.Log.Warn("the pod goes before its network, which is released as soon as its plugins do so", "sandbox", sb.ID, "err", err)
	return nil
}
