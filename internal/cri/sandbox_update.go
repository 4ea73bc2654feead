package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// UpdatePodSandboxResources tells of new resources of a pod as a whole (CRI
// UpdatePodSandboxResources). The pod's control group is the kubelet's, which has set it already,
// and the pause needs nothing of them, so a known sandbox is all that is asked for: NotFound else.
func (s *Service) UpdatePodSandboxResources(
	_ context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest,
) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	if _, err := s.View.Sandbox(r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
