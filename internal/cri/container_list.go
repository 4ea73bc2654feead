package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/wire"
)

// ListContainers lists containers by filter, newest first, from memory (CRI ListContainers). The items are encoded already; see package wire.
func (s *Service) ListContainers(_ context.Context, r *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	items, err := s.containerItems(r, r.GetFilter(), maxList)
	if err != nil {
		return nil, err
	}
	return wire.Carry(&runtimeapi.ListContainersResponse{}, items), nil
}

// containerItems are the items of a list of containers.
func (s *Service) containerItems(req any, f *runtimeapi.ContainerFilter, limit int) ([]byte, error) {
	if _, err := s.begin(req); err != nil {
		return nil, err
	}
	return s.encodedContainers.items(s.View.Containers(), func(c *spec.Container) bool { return spec.MatchContainer(f, c) }, limit)
}
