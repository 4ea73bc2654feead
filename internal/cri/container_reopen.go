package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ReopenContainerLog gives a running container a new log file at its path, after the kubelet has renamed the old one (CRI
// ReopenContainerLog). A container that does not run is FailedPrecondition, and no file is made.
func (s *Service) ReopenContainerLog(ctx context.Context, r *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	c, err := s.View.Container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	unlock, err := s.names.Lock(ctx, c.Name)
	if err != nil {
		return nil, fmt.Errorf("reopen log of container %s: %w", c.ID, err)
	}
	defer unlock()
	if c, err = s.View.Container(string(c.ID)); err != nil { // it may have changed while we waited
		return nil, err
	}
	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, fmt.Errorf("reopen log of container %s: it is %s, only a running one writes its log: %w", c.ID, c.State, errdefs.ErrFailedPrecondition)
	}
	if err := s.Logs.Reopen(ctx, c); err != nil {
		return nil, err
	}
	return &runtimeapi.ReopenContainerLogResponse{}, nil
}
