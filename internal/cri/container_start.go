package cri

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
)

// StartContainer starts a container that was created (CRI StartContainer). One that has run already is FailedPrecondition. A container
// whose start fails stays, as ended, with the engine's words; the kubelet removes it.
func (s *Service) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	c, err := s.View.Container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	unlock, err := s.names.Lock(ctx, c.Name)
	if err != nil {
		return nil, fmt.Errorf("start container %s: %w", c.ID, err)
	}
	defer unlock()
	if c, err = s.View.Container(string(c.ID)); err != nil { // it may have changed while we waited
		return nil, err
	}
	if c.State != runtimeapi.ContainerState_CONTAINER_CREATED {
		return nil, fmt.Errorf("start container %s: it is %s, only a created one can be started: %w", c.ID, c.State, errdefs.ErrFailedPrecondition)
	}
	if _, err := s.runningSandbox(string(c.SandboxID)); err != nil {
		return nil, fmt.Errorf("start container %s: %w", c.ID, err)
	}
	startErr := s.Engine.Start(ctx, c.ID)
	// The view and the log are put right whether or not it started, even if the caller has gone.
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoDeadline)
	defer cancel()
	err = errors.Join(startErr, s.View.Refresh(after, c.ID))
	if now, findErr := s.View.Container(string(c.ID)); findErr == nil {
		err = errors.Join(err, s.Logs.Started(after, now), s.checkStarted(after, now))
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

// checkStarted gives a container that has just been started the limits that Docker could not be told. It must not run without them, nor
// in a pod that was stopped meanwhile.
func (s *Service) checkStarted(ctx context.Context, c *spec.Container) error {
	err := s.Engine.Limit(c, c.Kernel)
	if err == nil {
		_, err = s.runningSandbox(string(c.SandboxID))
	}
	if err == nil {
		return nil
	}
	return errors.Join(err, s.killAll(ctx, []*spec.Container{c}, nil))
}

// runningSandbox is a sandbox that must run: NotFound or FailedPrecondition else.
func (s *Service) runningSandbox(id string) (*spec.Sandbox, error) {
	sb, err := s.View.Sandbox(id)
	if err != nil {
		return nil, err
	}
	if !sb.Running {
		return nil, fmt.Errorf("sandbox %s does not run: %w", sb.ID, errdefs.ErrFailedPrecondition)
	}
	return sb, nil
}
