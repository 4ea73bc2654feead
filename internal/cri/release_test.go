package cri

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/podnet"
)

// slowDel has each DEL wait until release is called, which is also done at the end of the test. It
// counts the DELs that began.
func slowDel(t *testing.T, w *world) (begun *atomic.Int32, release func()) {
	t.Helper()
	begun = &atomic.Int32{}
	held := make(chan struct{})
	wait := func(ctx context.Context) error {
		begun.Add(1)
		select {
		case <-held:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}

	w.delWait.Store(&wait)
	release = sync.OnceFunc(func() { close(held) })
	t.Cleanup(release)

	return begun, release
}

// stopWithin stops a pod as a caller that waits this long.
func stopWithin(t *testing.T, s *Service, id string, d time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	_, err := s.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
	return err
}

// TestSlowReleaseGoesOn: a DEL that outlasts its caller goes on, later callers wait for the same
// one, and then everything is gone.
func TestSlowReleaseGoesOn(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	begun, release := slowDel(t, w)
	err := stopWithin(t, s, id, 200*time.Millisecond)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "goes on") {
		t.Errorf("%v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); !errors.Is(err,
		context.Canceled) {
		t.Errorf("a caller that gives up: %v", err)
	}

	done := make(chan error, 1)
	go func() {
		_, err := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
		done <- err
	}()

	select {
	case err := <-done:
		t.Errorf("it did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}

	release()
	if err := <-done; err != nil {
		t.Error(err)
	}

	if n := begun.Load(); n != 1 {
		t.Errorf("%d DELs", n)
	}
	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Error(err)
	}

	w.nothingLeft(t, s)
}

// TestSlowReleaseAndKubeadm is kubeadm reset: it waits some seconds for a stop, five times, then
// removes, and never comes back. The containers go while the DEL goes on, and the rest when it
// ends.
func TestSlowReleaseAndKubeadm(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	begun, release := slowDel(t, w)
	err := error(context.DeadlineExceeded)
	for range 5 {
		if err = stopWithin(t, s, id, 200*time.Millisecond); err != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err = s.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
		cancel()
		break
	}

	if err != nil || w.engine.Containers() != 0 {
		t.Errorf("%v, %d containers", err, w.engine.Containers())
	}

	if got := keys(w, w.pins); len(got) != 1 {
		t.Errorf("the namespace went before its network: %v", got)
	}

	release()
	eventually(t, func() bool { return len(keys(w, w.pins)) == 0 && len(keys(w, w.attached)) == 0 })
	if n := begun.Load(); n != 1 {
		t.Errorf("%d DELs", n)
	}

	w.nothingLeft(t, s)
}

// TestSlowReleaseFails: the pod has gone before its network, whose DEL then fails. Recovery
// releases it.
func TestSlowReleaseFails(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	_, release := slowDel(t, w)
	w.setFault(func(step string) error {
		if step == "network del" {
			return errBroken
		}
		return nil
	})

	for range 2 { // callers that may give up before the pod goes
		if err := stopWithin(t, s, id, 100*time.Millisecond); err == nil {
			t.Error("it did not fail")
		}
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()

	if _, err := s.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Fatal(err)
	}

	release()
	select {
	case <-w.network.Leftovers():
	case <-time.After(20 * time.Second):
		t.Fatal("recovery was not woken")
	}

	w.setFault(nil)
	if err := s.Recover(t.Context()); err != nil {
		t.Error(err)
	}

	w.nothingLeft(t, s)
}

// TestUndoOfARelease: a pod whose ADD fails is released once if that succeeds. What fails quickly
// is tried again: a plugin whose ADD was cut off may fail at its first DEL.
func TestUndoOfARelease(t *testing.T) {
	for _, failing := range []int{0, undoTries - 1} {
		for _, reason := range []string{"", "by a flag"} {
			s, w := newServiceWith(t, reason)
			dels := 0
			w.setFault(func(step string) error {
				switch step {
				case "network add, after":
					return errBroken
				case "network del":
					if dels++; dels <= failing {
						return errBroken
					}
				}

				return nil
			})

			if _, err := s.RunPodSandbox(t.Context(),
				&runtimeapi.RunPodSandboxRequest{Config: w.pod()}); !errors.Is(err, errBroken) {
				t.Errorf("%v", err)
			}

			if dels != failing+1 {
				t.Errorf("%d DELs, want %d", dels, failing+1)
			}

			w.setFault(nil)
			w.nothingLeft(t, s)
		}
	}

	if undoSandboxDeadline < time.Minute || podnet.ReleaseDeadline < undoSandboxDeadline {
		t.Errorf("%v, %v", undoSandboxDeadline, podnet.ReleaseDeadline)
	}
}

// TestOwedNetwork: a pod does not wait for a program that was uninstalled, and keeps its namespace
// for it.
func TestOwedNetwork(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	w.setFault(func(step string) error {
		if step == "network del" {
			return fmt.Errorf("disconnect: %w", &podnet.MissingPluginError{Program: "host-local", Err: errBroken})
		}
		return nil
	})

	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Fatal(err)
	}

	if _, err := s.View.Sandbox(id); !errdefs.IsNotFound(err) || len(keys(w, w.pins)) != 1 {
		t.Errorf("%v, pins %v", err, keys(w, w.pins))
	}

	w.setFault(nil)
	if err := s.Recover(t.Context()); err != nil {
		t.Error(err)
	}

	w.nothingLeft(t, s)
}

// TestWaitingCounts: a caller that has waited in vain for a minute sees its pod go.
func TestWaitingCounts(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	_, release := slowDel(t, w)
	if err := stopWithin(t, s, id, 100*time.Millisecond); err == nil {
		t.Error("it did not fail")
	}

	w.later.Add(int64(time.Minute))
	if err := stopWithin(t, s, id, time.Second); err != nil {
		t.Error(err)
	}

	release()
	eventually(t, func() bool { return w.network.PendingReleases() == 0 && len(keys(w, w.attached)) == 0 })
}
