package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
)

// ListContainers lists containers by filter, newest first, from memory (CRI ListContainers).
func (s *Service) ListContainers(_ context.Context, r *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	resp := &runtimeapi.ListContainersResponse{}
	for _, c := range s.View.Containers() {
		if spec.MatchContainer(r.GetFilter(), c) {
			resp.Containers = append(resp.Containers, c.Item())
		}
	}
	return resp, nil
}
