package cri

import (
	"context"
	"slices"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// podStream receives the items of StreamPodSandboxes.
type podStream struct {
	runtimeapi.RuntimeService_StreamPodSandboxesServer
	ctx  context.Context //nolint:containedctx // as gRPC's streams have it
	seen []string
}

func (s *podStream) Context() context.Context { return s.ctx }

func (s *podStream) Send(r *runtimeapi.StreamPodSandboxesResponse) error {
	r, err := received(r, nil)
	if err != nil {
		return err
	}

	for _, p := range r.PodSandboxes {
		s.seen = append(s.seen, p.Id)
	}

	return nil
}

func TestStreamPodSandboxes(t *testing.T) {
	s, w := newService(t)
	a, b := runPod(t, s, w.pod()), runPod(t, s, w.pod())
	out := &podStream{ctx: t.Context()}
	if err := s.StreamPodSandboxes(&runtimeapi.StreamPodSandboxesRequest{}, out); err != nil || len(out.seen) != 2 ||
		!slices.Contains(out.seen, a) || !slices.Contains(out.seen, b) {
		t.Errorf("streamed %v, %v", out.seen, err)
	}

	out = &podStream{ctx: t.Context()}
	if err := s.StreamPodSandboxes(&runtimeapi.StreamPodSandboxesRequest{Filter: &runtimeapi.PodSandboxFilter{Id: a}},
		out); err != nil || !slices.Equal(out.seen, []string{a}) {
		t.Errorf("streamed by filter %v, %v", out.seen, err)
	}

	w.engine.SetDown(true)
	eventually(t, func() bool { return !s.View.Engine().Ready })
	if err := s.StreamPodSandboxes(&runtimeapi.StreamPodSandboxesRequest{}, out); err == nil {
		t.Error("got an empty list while the engine is down")
	}
}
