package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/wire"
)

// ListContainers lists containers by filter, newest first, from memory (CRI ListContainers). The
// items are already encoded; see package wire.
func (s *Service) ListContainers(
	_ context.Context, r *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	items, err := s.encodedContainers.items(s.Visible.Containers(), matchContainer(r.GetFilter()), maxList)
	if err != nil {
		return nil, err
	}

	return wire.WithEncoded(&runtimeapi.ListContainersResponse{}, items), nil
}

// matchContainer returns a predicate for the filter.
func matchContainer(f *runtimeapi.ContainerFilter) func(*model.Container) bool {
	return func(c *model.Container) bool { return model.MatchContainer(f, c) }
}
