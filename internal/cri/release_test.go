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

// slowDel blocks each DEL until release is called, at the latest at the end of the test. It counts
// the started DELs.
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

// stopWithin stops a pod with this timeout.
func stopWithin(t *testing.T, s *Service, id string, d time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	_, err := s.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
	return err
}

// TestSlowReleaseContinues: a DEL continues after its caller's timeout. Later callers wait for the
// same DEL, and finally everything is released.
func TestSlowReleaseContinues(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	begun, release := slowDel(t, w)
	err := stopWithin(t, s, id, 200*time.Millisecond)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "in the background") {
		t.Errorf("error: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); !errors.Is(err,
		context.Canceled) {
		t.Errorf("canceled caller: %v", err)
	}

	done := make(chan error, 1)
	go func() {
		_, err := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
		done <- err
	}()

	select {
	case err := <-done:
		t.Errorf("the call did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}

	release()
	if err := <-done; err != nil {
		t.Error(err)
	}

	if n := begun.Load(); n != 1 {
		t.Errorf("%d DELs, want 1", n)
	}
	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Error(err)
	}

	w.assertNoLeftovers(t, s)
}

// TestSlowReleaseAndKubeadm simulates kubeadm reset: it waits some seconds for a stop, five times,
// then removes the pod and never returns. The containers are removed during the DEL, and the
// network resources after it.
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
		t.Errorf("remove: %v, %d containers", err, w.engine.Containers())
	}

	if got := keys(w, w.pins); len(got) != 1 {
		t.Errorf("the namespace was removed before its network: %v", got)
	}

	release()
	eventually(t, func() bool { return len(keys(w, w.pins)) == 0 && len(keys(w, w.attached)) == 0 })
	if n := begun.Load(); n != 1 {
		t.Errorf("%d DELs, want 1", n)
	}

	w.assertNoLeftovers(t, s)
}

// TestSlowReleaseFails: the pod was removed before its network, and the DEL fails later. Recovery
// releases the network.
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

	for range 2 { // callers with a timeout before the pod is removed
		if err := stopWithin(t, s, id, 100*time.Millisecond); err == nil {
			t.Error("the stop succeeded")
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
		t.Fatal("no recovery was requested")
	}

	w.setFault(nil)
	if err := s.Recover(t.Context()); err != nil {
		t.Error(err)
	}

	w.assertNoLeftovers(t, s)
}

// TestUndoOfRelease: a pod with a failed ADD is released once if the DEL succeeds. Quick failures
// are retried: a plugin may fail at its first DEL after an interrupted ADD.
func TestUndoOfRelease(t *testing.T) {
	for _, failing := range []int{0, undoAttempts - 1} {
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
				t.Errorf("error: %v", err)
			}

			if dels != failing+1 {
				t.Errorf("%d DELs, want %d", dels, failing+1)
			}

			w.setFault(nil)
			w.assertNoLeftovers(t, s)
		}
	}

	if undoSandboxDeadline < time.Minute || podnet.ReleaseDeadline < undoSandboxDeadline {
		t.Errorf("undo deadline %v, release deadline %v", undoSandboxDeadline, podnet.ReleaseDeadline)
	}
}

// TestMissingPluginDefersRelease: the removal of a pod does not wait for an uninstalled plugin. The
// namespace is kept for the later release.
func TestMissingPluginDefersRelease(t *testing.T) {
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
		t.Errorf("sandbox: %v, pins %v", err, keys(w, w.pins))
	}

	w.setFault(nil)
	if err := s.Recover(t.Context()); err != nil {
		t.Error(err)
	}

	w.assertNoLeftovers(t, s)
}

// TestWaitingCounts: after a caller has waited in vain for a minute, the pod is removed without its
// network.
func TestWaitingCounts(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	_, release := slowDel(t, w)
	if err := stopWithin(t, s, id, 100*time.Millisecond); err == nil {
		t.Error("the stop succeeded")
	}

	w.later.Add(int64(time.Minute))
	if err := stopWithin(t, s, id, time.Second); err != nil {
		t.Error(err)
	}

	release()
	eventually(t, func() bool { return w.network.PendingReleases() == 0 && len(keys(w, w.attached)) == 0 })
}
