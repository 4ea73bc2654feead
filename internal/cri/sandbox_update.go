package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// UpdatePodSandboxResources checks for the sandbox and announces the update to NRI plugins (CRI
// UpdatePodSandboxResources). The kubelet owns the pod's cgroup and has updated it already, and the
// pause container needs no change. NotFound for an unknown ID.
func (s *Service) UpdatePodSandboxResources(
	ctx context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest,
) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	sb, err := s.View.Sandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}

	if err := s.hooks.updatePod(ctx, sb, r.GetOverhead(), r.GetResources()); err != nil {
		return nil, err
	}

	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
