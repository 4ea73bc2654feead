package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ReopenContainerLog gives a running container a new log file at its path, after the kubelet has
// renamed the old one (CRI ReopenContainerLog). A container that does not run is
// FailedPrecondition, and no file is made.
func (s *Service) ReopenContainerLog(
	ctx context.Context, r *runtimeapi.ReopenContainerLogRequest,
) (*runtimeapi.ReopenContainerLogResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}

	c, err := s.lockContainer(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	defer c.unlock()

	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, fmt.Errorf("reopen log of container %s: it is %s, only a running one writes its log: %w", c.ID,
			c.State, errdefs.ErrFailedPrecondition)
	}

	if err := s.Logs.Reopen(ctx, c.Container); err != nil {
		return nil, err
	}

	return &runtimeapi.ReopenContainerLogResponse{}, nil
}
