package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// UpdatePodSandboxResources only checks for the sandbox (CRI UpdatePodSandboxResources). The
// kubelet owns the pod's cgroup and has updated it already, and the pause container needs no
// change. NotFound for an unknown ID.
func (s *Service) UpdatePodSandboxResources(
	_ context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest,
) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}
	if _, err := s.View.Sandbox(r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
