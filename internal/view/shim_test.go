package view

import (
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/model"
)

// TestShimTrial has the trial of the containerd shim hang and fail before it succeeds. The view is
// ready meanwhile.
func TestShimTrial(t *testing.T) {
	f := enginetest.NewFake()
	f.Shim = model.Shim{Mode: "auto", IsPending: true, Problem: "the trial has not ended"}
	f.Trial = model.Shim{Mode: "auto", UserNSProblem: "no user namespaces"}
	release := make(chan struct{})
	var trials atomic.Int32
	f.Fault = func(verb string, after bool) error {
		if verb == "try shim" && !after && trials.Add(1) < 3 {
			<-release
			return errdefs.ErrUnavailable
		}
		return nil
	}

	v := run(t, f)
	<-v.Synced()
	id := makePod(t, f, "pod")
	eventually(t, "the new pod is in the view", func() bool { _, err := v.Sandbox(id); return err == nil })
	if s := v.Engine(); !s.Ready || !s.Host.Shim.IsPending || s.Host.Shim.IsActive() {
		t.Errorf("during the trial: %+v", s)
	}

	changed := v.Changed()
	close(release)
	<-changed
	if s := v.Engine(); !s.Ready || s.Host.Shim != f.Trial || trials.Load() != 3 {
		t.Errorf("after %d trials: %+v", trials.Load(), s)
	}
}
