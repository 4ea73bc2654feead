package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ReopenContainerLog gives a running container a new log file at its path after the kubelet has
// renamed the old one (CRI ReopenContainerLog). If the container is not running, it returns
// FailedPrecondition and creates no file.
func (s *Service) ReopenContainerLog(
	ctx context.Context, r *runtimeapi.ReopenContainerLogRequest,
) (*runtimeapi.ReopenContainerLogResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	c, err := s.lockContainer(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	defer c.unlock()

	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, fmt.Errorf("reopen log of container %s: state is %s, must be running: %w", c.ID,
			c.State, errdefs.ErrFailedPrecondition)
	}

	if err := s.Logs.Reopen(ctx, c.Container); err != nil {
		return nil, err
	}

	return &runtimeapi.ReopenContainerLogResponse{}, nil
}
