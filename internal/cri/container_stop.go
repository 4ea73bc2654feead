package cri

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// StopContainer sends a container its stop signal and, after timeout seconds, SIGKILL. A timeout of
// 0 kills at once (CRI StopContainer). It succeeds for a stopped or unknown container.
func (s *Service) StopContainer(
	ctx context.Context, r *runtimeapi.StopContainerRequest,
) (*runtimeapi.StopContainerResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	c, err := s.View.Container(r.GetContainerId())
	if err != nil {
		if err := ignoreNotFound(err); err != nil {
			return nil, err
		}
		return &runtimeapi.StopContainerResponse{}, nil
	}

	if c.State == runtimeapi.ContainerState_CONTAINER_CREATED {
		if c, err = s.awaitStart(ctx, c); err != nil {
			return nil, err
		}
	}

	if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
		grace := time.Duration(min(r.GetTimeout(), int64(maxGrace/time.Second))) * time.Second
		if err := ignoreNotFound(s.Engine.Stop(ctx, c.ID, grace)); err != nil {
			return nil, err
		}
		if err := s.View.Refresh(ctx, c.ID); err != nil {
			return nil, err
		}
	}

	s.hooks.stopped(ctx, c.ID)

	return &runtimeapi.StopContainerResponse{}, nil
}

// awaitStart waits for a start in progress and returns the container's record afterwards. If the
// container is still in state created, the stop also applies to a late start of it.
func (s *Service) awaitStart(ctx context.Context, c *model.Container) (*model.Container, error) {
	now, err := s.lockContainer(ctx, string(c.ID))
	if err != nil {
		return c, ignoreNotFound(err)
	}
	defer now.unlock()

	if now.State == runtimeapi.ContainerState_CONTAINER_CREATED {
		s.starts.markStopped(now.ID)
	}

	return now.Container, nil
}

// maxGrace is a bound for grace periods within the range of time.Duration.
const maxGrace = 10 * 365 * 24 * time.Hour
