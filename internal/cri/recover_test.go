package cri

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
	"cri-dockerd/internal/view"
)

// hangingEngine never removes certain containers.
type hangingEngine struct {
	Engine
	hangs []model.ContainerID
}

func (h hangingEngine) Remove(ctx context.Context, id model.ContainerID) error {
	if !slices.Contains(h.hangs, id) {
		return h.Engine.Remove(ctx, id)
	}
	<-ctx.Done()
	return ctx.Err()
}

// TestRecoveryOfHangingSandbox: incomplete sandboxes with a hanging removal delay neither the
// removal nor the adoption of others, and recovery itself at most by their deadline.
func TestRecoveryOfHangingSandbox(t *testing.T) {
	s, w := newService(t)
	var ids []model.ContainerID
	for range 2 * recoveriesAtOnce {
		create, err := translate.NewSandbox(w.pod(), translate.SandboxOptions{
			Image:       model.PauseImage{Source: enginetest.PauseRef, Name: enginetest.PauseRef},
			NetworkMode: "none",
		})
		if err != nil {
			t.Fatal(err)
		}

		id, err := w.engine.Create(t.Context(), create)
		if err != nil {
			t.Fatal(err)
		}

		ids = append(ids, id)
	}

	eventually(t, func() bool { return len(s.View.Sandboxes()) == len(ids) })
	hangs := []model.ContainerID{ids[0], ids[5], ids[len(ids)-1]}
	s.Engine = hangingEngine{s.Engine, hangs}

	ctx, stop := context.WithCancel(t.Context())
	recovered := make(chan error, 1)
	go func() { recovered <- s.Recover(ctx) }()
	eventually(t, func() bool { return len(s.View.Sandboxes()) == len(hangs) })
	for _, id := range hangs {
		if _, err := s.View.Sandbox(string(id)); err != nil {
			t.Errorf("hanging sandbox %s: %v", id, err)
		}
	}

	select {
	case err := <-recovered:
		t.Errorf("recovery returned before the engine: %v", err)
	default:
	}

	stop()
	if err := <-recovered; !errors.Is(err, context.Canceled) {
		t.Errorf("recovery: %v", err)
	}

	s.Engine = s.Engine.(hangingEngine).Engine
	if err := s.Recover(t.Context()); err != nil {
		t.Error(err)
	}

	for _, id := range ids {
		if _, err := s.View.Sandbox(string(id)); !errdefs.IsNotFound(err) {
			t.Errorf("sandbox %s: %v", id, err)
		}
	}
}

// TestEachSandboxHasADeadline: recovery of a sandbox has its own deadline, independent of the
// caller's.
func TestEachSandboxHasADeadline(t *testing.T) {
	s, w := newService(t)
	runPod(t, s, w.pod())
	errs := recovery{s}.forEachSandbox(t.Context(), func(ctx context.Context, sb *model.Sandbox) error {
		if at, ok := ctx.Deadline(); !ok || time.Until(at) > recoverSandboxTimeout {
			t.Errorf("sandbox %s: deadline %v, %v", sb.ID, at, ok)
		}
		return errdefs.ErrAborted
	})
	if err := errors.Join(errs...); !errdefs.IsAborted(err) {
		t.Errorf("errors: %v", err)
	}
}

// watchedView closes watched at the first watch.
type watchedView struct {
	View
	watched chan struct{}
}

func (v watchedView) Watch() *view.Watch {
	defer close(v.watched)
	return v.View.Watch()
}

// TestSandboxRemovedByOthers: if someone removes a sandbox through the engine, its network is
// released without another call or connection. The service's own removals request no recovery.
func TestSandboxRemovedByOthers(t *testing.T) {
	s, w := newService(t)
	watched := watchedView{View: s.View, watched: make(chan struct{})}
	s.View = watched
	ctx, stop := context.WithCancel(t.Context())
	followed := make(chan struct{})
	go func() { defer close(followed); s.CompleteStarts(ctx) }()
	defer func() { stop(); <-followed }()

	<-watched.watched
	var ids []string
	for range 2 {
		r, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: w.pod()})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, r.PodSandboxId)
	}

	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{
		PodSandboxId: ids[0],
	}); err != nil {
		t.Fatal(err)
	}

	if err := w.engine.Remove(t.Context(), model.ContainerID(ids[1])); err != nil {
		t.Fatal(err)
	}

	select {
	case <-w.network.Leftovers():
	case <-time.After(20 * time.Second):
		t.Fatal("no recovery was requested")
	}

	if err := s.Recover(t.Context()); err != nil {
		t.Error(err)
	}

	w.assertNoLeftovers(t, s)
	select {
	case <-w.network.Leftovers():
		t.Error("another recovery was requested")
	default:
	}
}
