package cri

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestPages gives every item once, in order, in messages of bounded size; an item that is larger goes alone.
func TestPages(t *testing.T) {
	small, half, large := strings.Repeat("s", 10), strings.Repeat("h", pageSize/2-100), strings.Repeat("l", 2*pageSize)
	var in []*runtimeapi.PodSandbox
	for _, id := range []string{small, half, half, half, large, small, small} {
		in = append(in, &runtimeapi.PodSandbox{Id: id})
	}
	var counts []int
	var got []*runtimeapi.PodSandbox
	if err := pages(in, func(p []*runtimeapi.PodSandbox) error {
		counts, got = append(counts, len(p)), append(got, p...)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, in) || !slices.Equal(counts, []int{3, 1, 1, 2}) {
		t.Errorf("%d items in pages of %v", len(got), counts)
	}
	if err := pages(nil, func([]*runtimeapi.PodSandbox) error { return errors.New("an empty page was sent") }); err != nil {
		t.Error(err)
	}
	boom := errors.New("the client has gone")
	if err := pages(in, func([]*runtimeapi.PodSandbox) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("an error of the stream: %v", err)
	}
}

// podStream takes what StreamPodSandboxes sends.
type podStream struct {
	runtimeapi.RuntimeService_StreamPodSandboxesServer
	ctx  context.Context //nolint:containedctx // as gRPC's streams have it
	seen []string
}

func (s *podStream) Context() context.Context { return s.ctx }

func (s *podStream) Send(r *runtimeapi.StreamPodSandboxesResponse) error {
	for _, p := range r.PodSandboxes {
		s.seen = append(s.seen, p.Id)
	}
	return nil
}

func TestStreamPodSandboxes(t *testing.T) {
	s, w := newService(t)
	a, b := runPod(t, s, w.pod()), runPod(t, s, w.pod())
	out := &podStream{ctx: t.Context()}
	if err := s.StreamPodSandboxes(&runtimeapi.StreamPodSandboxesRequest{}, out); err != nil || len(out.seen) != 2 || !slices.Contains(out.seen, a) || !slices.Contains(out.seen, b) {
		t.Errorf("streamed %v, %v", out.seen, err)
	}
	out = &podStream{ctx: t.Context()}
	if err := s.StreamPodSandboxes(&runtimeapi.StreamPodSandboxesRequest{Filter: &runtimeapi.PodSandboxFilter{Id: a}}, out); err != nil || !slices.Equal(out.seen, []string{a}) {
		t.Errorf("streamed by filter %v, %v", out.seen, err)
	}
	w.engine.SetDown(true)
	eventually(t, func() bool { return !s.View.Engine().Ready })
	if err := s.StreamPodSandboxes(&runtimeapi.StreamPodSandboxesRequest{}, out); err == nil {
		t.Error("an empty list while the engine is down")
	}
}
