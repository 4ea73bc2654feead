package cri

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/view"
)

// trialStates is a ready engine with a state of the containerd shim.
type trialStates struct {
	mu      sync.Mutex
	shim    model.Shim
	changed chan struct{}
}

func (v *trialStates) Engine() view.EngineState {
	v.mu.Lock()
	defer v.mu.Unlock()
	return view.EngineState{Attempted: true, Connected: true, Ready: true, Host: model.Host{Shim: v.shim}}
}

func (v *trialStates) Changed() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changed
}

func (v *trialStates) set(shim model.Shim) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.shim = shim
	close(v.changed)
	v.changed = make(chan struct{})
}

// TestAwaitTrial checks that a new pod waits for the trial of the shim, up to a timeout.
func TestAwaitTrial(t *testing.T) {
	pending := model.Shim{Mode: "auto", IsPending: true, Problem: "the trial has not ended"}
	overdue := pending
	overdue.IsOverdue = true
	for name, c := range map[string]struct {
		result model.Shim // after a second
		cancel bool       // after another second
		after  time.Duration
	}{
		"trial ends":  {result: model.Shim{Mode: "auto"}, after: time.Second},
		"no result":   {result: overdue, after: time.Second},
		"trial hangs": {result: pending, after: trialWait},
		"call ends":   {result: pending, cancel: true, after: 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v := &trialStates{shim: pending, changed: make(chan struct{})}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()

				var other sync.WaitGroup
				defer other.Wait()
				other.Go(func() {
					time.Sleep(time.Second)
					v.set(c.result)
					time.Sleep(time.Second)
					if c.cancel {
						cancel()
					}
				})

				begin := time.Now()
				err := awaitTrial(ctx, v)
				if took := time.Since(begin); errors.Is(err, context.Canceled) != c.cancel || took != c.after {
					t.Errorf("%v after %v", err, took)
				}
			})
		})
	}
}

// shimView is a View whose engine has a state of the containerd shim.
type shimView struct {
	View
	states *trialStates
}

func (v shimView) Engine() view.EngineState { return v.states.Engine() }

// TestFeaturesOfTheShim checks that Status denies a feature only after a trial. A kubelet rejects
// pods with the groups policy Strict for good without it.
func TestFeaturesOfTheShim(t *testing.T) {
	s, _ := newService(t)
	original := s.View
	for name, c := range map[string]struct {
		shim model.Shim
		want bool
	}{
		"active":  {model.Shim{Mode: "auto"}, true},
		"pending": {model.Shim{Mode: "auto", IsPending: true, Problem: "pending"}, true},
		"overdue": {model.Shim{Mode: "shim", IsPending: true, IsOverdue: true, Problem: "no result"}, true},
		"failed":  {model.Shim{Mode: "auto", Problem: "no shim"}, false},
		"engine":  {model.Shim{Mode: "engine"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s.View = shimView{original, &trialStates{shim: c.shim}}
			r, err := s.Status(t.Context(), &runtimeapi.StatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if f := r.Features; f.SupplementalGroupsPolicy != c.want || f.MountOptions != c.want {
				t.Errorf("features %v, want both %v", f, c.want)
			}
		})
	}
}
