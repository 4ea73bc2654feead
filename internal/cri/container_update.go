package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// UpdateContainerResources changes a container's limits (CRI UpdateContainerResources). A request
// without Linux resources changes nothing. A failed call may have applied some of the changes; the
// kubelet repeats it.
func (s *Service) UpdateContainerResources(
	ctx context.Context, r *runtimeapi.UpdateContainerResourcesRequest,
) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	host, err := s.host()
	if err != nil {
		return nil, err
	}

	c, err := s.lockContainer(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	defer c.unlock()

	if r.GetLinux() == nil {
		return &runtimeapi.UpdateContainerResourcesResponse{}, nil
	}

	want, others, err := s.hooks.update(ctx, c.Container, r.GetLinux())
	if err != nil {
		return nil, err
	}

	if err := (LimitKeeper{s}).set(ctx, c, want, others, host); err != nil {
		return nil, err
	}
	s.hooks.updated(ctx, c.Container)

	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}
