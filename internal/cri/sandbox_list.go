package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/wire"
)

// ListPodSandbox lists sandboxes by filter, newest first, from memory (CRI ListPodSandbox). The
// items are already encoded; see package wire.
func (s *Service) ListPodSandbox(
	_ context.Context, r *runtimeapi.ListPodSandboxRequest,
) (*runtimeapi.ListPodSandboxResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	items, err := s.encodedSandboxes.items(s.Visible.Sandboxes(), matchSandbox(r.GetFilter()), maxList)
	if err != nil {
		return nil, err
	}

	return wire.WithEncoded(&runtimeapi.ListPodSandboxResponse{}, items), nil
}

// matchSandbox returns a predicate for the filter.
func matchSandbox(f *runtimeapi.PodSandboxFilter) func(*model.Sandbox) bool {
	return func(sb *model.Sandbox) bool { return model.MatchSandbox(f, sb) }
}
