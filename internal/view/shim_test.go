package view

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

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

	close(release)
	eventually(t, "the trial has a result", func() bool { return !v.Engine().Host.Shim.IsPending })
	if s := v.Engine(); !s.Ready || s.Host.Shim != f.Trial || trials.Load() != 3 {
		t.Errorf("after %d trials: %+v", trials.Load(), s)
	}
}

// slowTrial is an engine on which a trial of the shim takes a time.
type slowTrial struct {
	down
	takes time.Duration
	count int
}

func (s *slowTrial) TryShim(ctx context.Context) (model.Shim, error) {
	s.count++
	select {
	case <-time.After(s.takes):
		return model.Shim{Mode: "auto"}, nil
	case <-ctx.Done():
		return model.Shim{}, ctx.Err()
	}
}

// TestSlowShimTrial: a trial may take longer after each failure, so the shim is used on a slow
// node. New pods do not wait for it after the first failure. On a hung engine trials are rare.
func TestSlowShimTrial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := &slowTrial{takes: 75 * time.Second}
		v := New(slow, discard)
		pending := model.Shim{Mode: "auto", IsPending: true}
		v.setReady(model.Host{Shim: pending})

		ended := make(chan error)
		go func() { ended <- v.tryShim(t.Context(), pending) }()

		time.Sleep(trialMin + time.Millisecond)
		synctest.Wait()
		s := v.Engine().Host.Shim
		if !s.IsPending || !s.IsOverdue || s.IsActive() || !strings.Contains(s.Problem, "deadline exceeded") {
			t.Errorf("after the first timeout: %+v", s)
		}

		if err := <-ended; err != nil || slow.count != 3 || v.Engine().Host.Shim != (model.Shim{Mode: "auto"}) {
			t.Errorf("%v, %d trials, %+v", err, slow.count, v.Engine().Host.Shim)
		}
	})

	synctest.Test(t, func(t *testing.T) {
		hung := &slowTrial{takes: 24 * time.Hour}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()

		if err := New(hung, discard).tryShim(ctx, model.Shim{}); err == nil || hung.count < 20 || hung.count > 35 {
			t.Errorf("%v after %d trials in an hour", err, hung.count)
		}
	})
}
