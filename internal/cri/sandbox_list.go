package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/wire"
)

// ListPodSandbox lists sandboxes by filter, newest first, from memory (CRI ListPodSandbox). The items are encoded already; see package wire.
func (s *Service) ListPodSandbox(_ context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	items, err := s.sandboxItems(r, r.GetFilter(), maxList)
	if err != nil {
		return nil, err
	}
	return wire.Carry(&runtimeapi.ListPodSandboxResponse{}, items), nil
}

// sandboxItems are the items of a list of sandboxes.
func (s *Service) sandboxItems(req any, f *runtimeapi.PodSandboxFilter, limit int) ([]byte, error) {
	if _, err := s.begin(req); err != nil {
		return nil, err
	}
	return s.encodedSandboxes.items(s.View.Sandboxes(), func(sb *spec.Sandbox) bool { return spec.MatchSandbox(f, sb) }, limit)
}
