package cri

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
)

// StopContainer stops a container: its stop signal, and SIGKILL after timeout seconds, at once with
// 0 (CRI StopContainer). A stopped or unknown container is a success.
func (s *Service) StopContainer(
	ctx context.Context, r *runtimeapi.StopContainerRequest,
) (*runtimeapi.StopContainerResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}

	c, err := s.View.Container(r.GetContainerId())
	if err != nil {
		if err := notFoundIsFine(err); err != nil {
			return nil, err
		}
		return &runtimeapi.StopContainerResponse{}, nil
	}

	if c.State == runtimeapi.ContainerState_CONTAINER_CREATED {
		if c, err = s.afterStart(ctx, c); err != nil {
			return nil, err
		}
	}

	if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
		grace := time.Duration(min(r.GetTimeout(), int64(maxGrace/time.Second))) * time.Second
		if err := notFoundIsFine(s.Engine.Stop(ctx, c.ID, grace)); err != nil {
			return nil, err
		}
		if err := s.View.Refresh(ctx, c.ID); err != nil {
			return nil, err
		}
	}

	return &runtimeapi.StopContainerResponse{}, nil
}

// afterStart is a created container after a start that is under way: a stop that came in its middle
// must not be forgotten.
func (s *Service) afterStart(ctx context.Context, c *spec.Container) (*spec.Container, error) {
	now, err := s.lockContainer(ctx, string(c.ID))
	if err != nil {
		return c, notFoundIsFine(err)
	}
	defer now.unlock()

	if now.State == runtimeapi.ContainerState_CONTAINER_CREATED {
		s.starts.stop(now.ID)
	}

	return now.Container, nil
}

// maxGrace keeps absurd grace periods within what a Duration can hold.
const maxGrace = 10 * 365 * 24 * time.Hour
