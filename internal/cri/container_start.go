package cri

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// StartContainer starts a created container (CRI StartContainer). FailedPrecondition if it has run
// before. After a failed start the container remains as exited, with the engine's message, until
// the kubelet removes it. If the engine completes the start after this call has failed,
// CompleteStarts finishes it.
func (s *Service) StartContainer(
	ctx context.Context, r *runtimeapi.StartContainerRequest,
) (*runtimeapi.StartContainerResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	c, err := s.lockContainer(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	defer c.unlock()

	if c.State != runtimeapi.ContainerState_CONTAINER_CREATED {
		return nil, fmt.Errorf("start container %s: state is %s, must be created: %w", c.ID, c.State,
			errdefs.ErrFailedPrecondition)
	}

	if _, err := s.runningSandbox(string(c.SandboxID)); err != nil {
		return nil, fmt.Errorf("start container %s: %w", c.ID, err)
	}

	if _, err := s.Visible.Container(string(c.ID)); err != nil { // its plugins have not completed
		return nil, err
	}

	announced, err := s.hooks.start(ctx, c.Container)
	if err != nil {
		return nil, err
	}
	defer announced()

	startErr := s.Engine.Start(ctx, c.ID)

	// Update the view and the log even if the start failed or the caller is disconnected.
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
		s.starts.markLate(c.ID)
	}

	_, podErr := s.runningSandbox(string(c.SandboxID))
	if err := errors.Join(startErr, renewErr, s.finishStart(after, c, podErr)); err != nil {
		return nil, err
	}

	s.starts.forget(c.ID)
	s.hooks.started(after, c.Container)

	return &runtimeapi.StartContainerResponse{}, nil
}

// finishStart creates the log path of a container after its start, successful or not, and applies
// the limits Docker's API lacks. It kills the container if the limits fail, or if its pod was
// stopped meanwhile (podErr).
func (s *Service) finishStart(ctx context.Context, c *lockedContainer, podErr error) error {
	logErr := s.Logs.Started(ctx, c.Container)
	adjusted, err := LimitKeeper{s}.withAdjusted(c.Container)
	err = errors.Join(err, LimitKeeper{s}.keepLater(c.ID, s.Engine.LimitStarted(ctx, adjusted)), podErr)
	if err == nil {
		return logErr
	}
	return errors.Join(logErr, err, s.killAll(ctx, []*model.Container{c.Container}, nil))
}

// runningSandbox returns a ready sandbox, or NotFound or FailedPrecondition.
func (g *gate) runningSandbox(id string) (*model.Sandbox, error) {
	sb, err := g.view.Sandbox(id)
	switch {
	case err != nil:
		return nil, err
	case sb.Restarted:
		return nil, fmt.Errorf("the pause container of sandbox %s was restarted; the pod must be created again: %w",
			sb.ID, errdefs.ErrFailedPrecondition)
	case !sb.Running:
		return nil, fmt.Errorf("sandbox %s is not running: %w", sb.ID, errdefs.ErrFailedPrecondition)
	}

	return sb, nil
}
