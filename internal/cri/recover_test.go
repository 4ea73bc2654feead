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

// followed returns a service that follows the view.
func followed(t *testing.T) (*Service, *world) {
	t.Helper()
	s, w := newService(t)
	watched := watchedView{View: s.View, watched: make(chan struct{})}
	s.View = watched
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); s.CompleteStarts(ctx) }()
	t.Cleanup(func() { stop(); <-ended })
	<-watched.watched

	return s, w
}

// TestSandboxRemovedByOthers: if someone removes a sandbox through the engine, its network is
// released without another call, connection or recovery.
func TestSandboxRemovedByOthers(t *testing.T) {
	s, w := followed(t)
	own, other := runPod(t, s, w.pod()), runPod(t, s, w.pod())
	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: own}); err != nil {
		t.Fatal(err)
	}

	if err := w.engine.Remove(t.Context(), model.ContainerID(other)); err != nil {
		t.Fatal(err)
	}

	eventually(t, func() bool { return len(keys(w, w.attached))+len(keys(w, w.pins)) == 0 })
	w.assertNoLeftovers(t, s)
	select {
	case <-w.network.Leftovers():
		t.Error("a recovery was requested")
	default:
	}
}

// TestRemovalsAreIndependent: the network of a removed sandbox is released while the DEL of another
// one hangs, and a recovery with it.
func TestRemovalsAreIndependent(t *testing.T) {
	s, w := followed(t)
	hanging, other := runPod(t, s, w.pod()), runPod(t, s, w.pod())
	begun, _ := slowDel(t, w)
	if err := w.engine.Remove(t.Context(), model.ContainerID(hanging)); err != nil {
		t.Fatal(err)
	}

	eventually(t, func() bool { return begun.Load() == 1 })
	recovered := make(chan struct{})
	go func() { defer close(recovered); _ = s.Recover(t.Context()) }()
	w.delWait.Store(nil) // later DELs do not hang
	if err := w.engine.Remove(t.Context(), model.ContainerID(other)); err != nil {
		t.Fatal(err)
	}

	eventually(t, func() bool { return !w.has(w.attached, other) && !w.has(w.pins, other) })
	if !w.has(w.attached, hanging) {
		t.Error("the hanging DEL has ended")
	}

	select {
	case <-recovered:
		t.Error("the recovery did not wait for the hanging DEL")
	default:
	}
}

// TestFailedReleaseIsRetried: if the release of a removed sandbox fails, a recovery is requested.
func TestFailedReleaseIsRetried(t *testing.T) {
	s, w := followed(t)
	id := runPod(t, s, w.pod())
	fail := func(context.Context) error { return errBroken }
	w.delWait.Store(&fail)
	if err := w.engine.Remove(t.Context(), model.ContainerID(id)); err != nil {
		t.Fatal(err)
	}

	select {
	case <-w.network.Leftovers():
	case <-time.After(20 * time.Second):
		t.Fatal("no recovery was requested")
	}

	w.delWait.Store(nil)
	if err := s.Recover(t.Context()); err != nil {
		t.Error(err)
	}

	w.assertNoLeftovers(t, s)
}
