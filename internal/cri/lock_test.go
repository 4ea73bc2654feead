package cri

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// refresh updates the view after a direct change at the engine.
func refresh(t *testing.T, s *Service, id string) {
	t.Helper()
	if err := s.View.Refresh(t.Context(), model.ContainerID(id)); err != nil {
		t.Fatal(err)
	}
}

func holdLock(t *testing.T, s *Service, key string) (unlock func()) {
	t.Helper()
	unlock, err := s.names.Lock(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return unlock
}

// TestCallsWaitForTheLockOfTheID: every call with side effects waits for the lock of its object,
// and returns when its ctx ends.
func TestCallsWaitForTheLockOfTheID(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	running := started(t, s, createRequest(pod, cfg))
	other := createRequest(pod, cfg)
	other.Config.Metadata.Name = "other"
	created, err := s.CreateContainer(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}

	for _, key := range []string{"sandbox " + pod, "container " + running, "container " + created.ContainerId} {
		defer holdLock(t, s, key)()
	}

	tests := map[string]func(ctx context.Context) error{
		"StopPodSandbox": func(ctx context.Context) error {
			_, err := s.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
			return err
		},
		"RemovePodSandbox": func(ctx context.Context) error {
			_, err := s.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod[:12]})
			return err
		},
		"StartContainer": func(ctx context.Context) error {
			_, err := s.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created.ContainerId})
			return err
		},
		"StopContainer, created": func(ctx context.Context) error {
			_, err := s.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: created.ContainerId})
			return err
		},
		"RemoveContainer": func(ctx context.Context) error {
			_, err := s.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: running})
			return err
		},
		"UpdateContainerResources": func(ctx context.Context) error {
			_, err := s.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
				ContainerId: running, Linux: &runtimeapi.LinuxContainerResources{CpuShares: 5},
			})
			return err
		},
		"ReopenContainerLog": func(ctx context.Context) error {
			_, err := s.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: running[:12]})
			return err
		},
	}

	for name, call := range tests {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s while another call holds the lock: %v", name, err)
			}
			cancel()
		})
	}

	if w.engine.Containers() != 3 {
		t.Error("an object was removed without its lock")
	}
}

// TestTheRecordIsReadUnderTheLock: a pause container started while StopPodSandbox waits is stopped,
// although it was not running when the call began.
func TestTheRecordIsReadUnderTheLock(t *testing.T) {
	s, w := newService(t)
	pod := runPod(t, s, w.pod())
	w.engine.End(model.ContainerID(pod), 0)
	refresh(t, s, pod)
	unlock := holdLock(t, s, "sandbox "+pod)
	stopped := make(chan error, 1)
	go func() {
		_, err := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
		stopped <- err
	}()

	eventually(t, func() bool { return s.names.Waiting("sandbox "+pod) == 1 })
	if err := w.engine.Start(t.Context(), model.ContainerID(pod)); err != nil {
		t.Fatal(err)
	}

	refresh(t, s, pod)

	unlock()
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}

	if o, err := w.engine.Inspect(t.Context(), model.ContainerID(pod)); err != nil || o.Sandbox.Running {
		t.Errorf("the pause container is running after StopPodSandbox: %+v, %v", o.Sandbox, err)
	}
}

// TestPauseRemovedBeforeItIsLocked: someone removes a pod between its creation and its lock. Its
// network is released completely.
func TestPauseRemovedBeforeItIsLocked(t *testing.T) {
	s, w := newService(t)
	removed := false
	w.setEngineFault(func(verb string, after bool) error {
		if verb != "create" || !after || removed {
			return nil
		}

		removed = true
		all, err := w.engine.Objects(t.Context())
		for _, o := range all {
			w.engine.Drop(o.Sandbox.ID)
		}

		return err
	})

	if _, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: w.pod()}); err != nil {
		t.Logf("RunPodSandbox: %v", err)
	}

	l, err := received(s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}))
	if err != nil {
		t.Fatal(err)
	}

	for _, p := range l.Items {
		if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{
			PodSandboxId: p.Id,
		}); err != nil {
			t.Error(err)
		}
	}

	w.assertNoLeftovers(t, s)
}

// TestRestartedPause: a restarted pause container makes its pod NotReady, with a network of the
// daemon or the engine. The pod accepts no further containers, and the next RunPodSandbox of the
// same pod creates a new sandbox.
func TestRestartedPause(t *testing.T) {
	for _, reason := range []string{"", "by a flag"} {
		s, w := newServiceWith(t, reason)
		cfg := w.pod()
		pod := runPod(t, s, cfg)
		c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
		if err != nil {
			t.Fatal(err)
		}

		w.engine.End(model.ContainerID(pod), 0)
		if err := w.engine.Start(t.Context(), model.ContainerID(pod)); err != nil {
			t.Fatal(err)
		}

		refresh(t, s, pod)

		st, err := s.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
		if err != nil || st.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("PodSandboxStatus: %v, %v", st, err)
		}

		if _, err := s.StartContainer(t.Context(),
			&runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("StartContainer: %v", err)
		}

		r := createRequest(pod, cfg)
		r.Config.Metadata.Name = "another"
		if _, err := s.CreateContainer(t.Context(), r); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("CreateContainer: %v", err)
		}

		anew := runPod(t, s, cfg)
		if anew == pod {
			t.Error("got the restarted sandbox")
		}

		if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{
			PodSandboxId: anew,
		}); err != nil {
			t.Error(err)
		}

		w.assertNoLeftovers(t, s)
	}
}
