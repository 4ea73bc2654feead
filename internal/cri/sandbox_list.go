package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
)

// ListPodSandbox lists sandboxes by filter, newest first, from memory (CRI ListPodSandbox).
func (s *Service) ListPodSandbox(_ context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	resp := &runtimeapi.ListPodSandboxResponse{}
	for _, sb := range s.View.Sandboxes() {
		if spec.MatchSandbox(r.GetFilter(), sb) {
			resp.Items = append(resp.Items, sb.Item())
		}
	}
	return resp, nil
}
