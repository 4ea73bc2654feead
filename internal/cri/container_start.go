package cri

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
)

// StartContainer starts a container that was created (CRI StartContainer). One that has run already
// is FailedPrecondition. A container whose start fails stays, as ended, with the engine's words;
// the kubelet removes it. What a start that outlasts the call leaves open, CompleteStarts does.
func (s *Service) StartContainer(
	ctx context.Context, r *runtimeapi.StartContainerRequest,
) (*runtimeapi.StartContainerResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}

	c, err := s.lockContainer(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	defer c.unlock()

	if c.State != runtimeapi.ContainerState_CONTAINER_CREATED {
		return nil, fmt.Errorf("start container %s: it is %s, only a created one can be started: %w", c.ID, c.State,
			errdefs.ErrFailedPrecondition)
	}

	if _, err := s.runningSandbox(string(c.SandboxID)); err != nil {
		return nil, fmt.Errorf("start container %s: %w", c.ID, err)
	}

	startErr := s.Engine.Start(ctx, c.ID)

	// The view and the log are put right whether or not it started, even if the caller has gone.
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoDeadline)
	defer cancel()

	renewErr := s.renew(after, c)
	if errdefs.IsNotFound(renewErr) {
		return nil, errors.Join(startErr, renewErr)
	}
	if startErr != nil && isUnstarted(c.Container) {
		renewErr = errors.Join(renewErr, s.killForgotten(after, c.ID))
	}
	if startErr != nil && c.State == runtimeapi.ContainerState_CONTAINER_CREATED {
		s.starts.outlasts(c.ID)
	}

	_, podErr := s.runningSandbox(string(c.SandboxID))
	if err := errors.Join(startErr, renewErr, s.finishStart(after, c, podErr)); err != nil {
		return nil, err
	}

	s.starts.forget(c.ID)

	return &runtimeapi.StartContainerResponse{}, nil
}

// finishStart makes the log of a container that has been started (or failed to) visible and gives
// it the limits that Docker's API lacks. It must not run without them, nor in a pod that was
// stopped meanwhile, for which podErr is the reason.
func (s *Service) finishStart(ctx context.Context, c *lockedContainer, podErr error) error {
	logErr := s.Logs.Started(ctx, c.Container)
	err := errors.Join(s.Engine.LimitStarted(c.Container), podErr)
	if err == nil {
		return logErr
	}
	return errors.Join(logErr, err, s.killAll(ctx, []*spec.Container{c.Container}, nil))
}

// runningSandbox is a sandbox that must be ready: NotFound or FailedPrecondition else.
func (g *gate) runningSandbox(id string) (*spec.Sandbox, error) {
	sb, err := g.view.Sandbox(id)
	switch {
	case err != nil:
		return nil, err
	case sb.Restarted:
		return nil, fmt.Errorf("the pause of sandbox %s was restarted; the pod must be made anew: %w", sb.ID,
			errdefs.ErrFailedPrecondition)
	case !sb.Running:
		return nil, fmt.Errorf("sandbox %s does not run: %w", sb.ID, errdefs.ErrFailedPrecondition)
	}

	return sb, nil
}
