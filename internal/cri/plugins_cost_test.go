package cri

import (
	"testing"

	"cri-dockerd/internal/model"
)

// BenchmarkPluginsOff measures what the three calls of a pod's start execute for NRI while it is
// off.
func BenchmarkPluginsOff(b *testing.B) {
	s := &Service{hooks: newHooks(&Service{})}
	c := &model.Container{ID: "c", SandboxID: "p"}
	ctx := b.Context()

	b.ReportAllocs()
	for b.Loop() {
		if err := s.hooks.runPod(ctx, c.SandboxID); err != nil {
			b.Fatal(err)
		}
		if err := s.hooks.create(ctx, c.ID); err != nil {
			b.Fatal(err)
		}

		end, err := s.hooks.start(ctx, c)
		if err != nil {
			b.Fatal(err)
		}
		s.hooks.started(ctx, c)
		end()
	}
}

// TestPluginsOffCost allows no allocation. `make bench-nri` prints its log.
func TestPluginsOffCost(t *testing.T) {
	r := testing.Benchmark(BenchmarkPluginsOff)
	t.Logf("NRI off: a start of a pod with one container has %d allocations and %.1f ns for NRI", r.AllocsPerOp(),
		float64(r.T.Nanoseconds())/float64(r.N))
	if r.N == 0 || r.AllocsPerOp() != 0 {
		t.Errorf("%d runs with %d allocations each, want 0", r.N, r.AllocsPerOp())
	}
}
