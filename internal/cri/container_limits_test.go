package cri

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

// keepLimits runs a LimitKeeper until the end of the test.
func keepLimits(t *testing.T, s *Service) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { LimitKeeper{s}.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// TestLimitsAreRestored: the limits are restored after each event that may replace them, and after
// a failure. Exited containers have none.
func TestLimitsAreRestored(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	id := model.ContainerID(started(t, s, limited(pod, cfg)))
	r := limited(pod, cfg)
	r.Config.Metadata.Name = "exited"
	exited := model.ContainerID(started(t, s, r))
	w.engine.End(exited, 0)
	eventually(t, func() bool {
		c, err := s.View.Container(string(exited))
		return err == nil && c.State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	keepLimits(t, s)

	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"reload of systemd", func() error { w.engine.LoseLimits(); return nil }},
		{"update by an operator", func() error {
			return w.engine.Update(t.Context(), id, &translate.Update{Resources: container.Resources{CPUShares: 7}})
		}},
		{"update by the kubelet", func() error {
			_, err := s.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
				ContainerId: string(id),
				Linux:       &runtimeapi.LinuxContainerResources{CpusetCpus: "0"},
			})
			return err
		}},
		{"connection to the engine", func() error { w.engine.SetDown(true); w.engine.SetDown(false); return nil }},
	} {
		t.Run(step.name, func(t *testing.T) {
			before := w.engine.Kept(id)
			if err := step.do(); err != nil {
				t.Fatal(err)
			}
			eventually(t, func() bool { return w.engine.Kept(id) > before })
		})
	}

	if n := w.engine.Kept(exited); n > 0 {
		t.Errorf("limits of an exited container were restored %d times", n)
	}
}

// TestRestoreIsRetried: a failed attempt is repeated.
func TestRestoreIsRetried(t *testing.T) {
	s, w := newService(t)
	queue := retries{Updates: s.Updates}
	s.Updates = &queue
	cfg := w.pod()
	id := model.ContainerID(started(t, s, limited(runPod(t, s, cfg), cfg)))
	for _, err := range []error{errBroken, fmt.Errorf("systemd: %w", errdefs.ErrUnavailable)} {
		t.Run(err.Error(), func(t *testing.T) {
			w.setEngineFault(func(verb string, _ bool) error {
				if verb == "keep" {
					return err
				}
				return nil
			})
			before := queue.added.Load()
			LimitKeeper{s}.restore(t.Context(), id)
			if n := queue.added.Load() - before; n != 1 || w.engine.Kept(id) != 0 {
				t.Errorf("retried %d times, restored %d times", n, w.engine.Kept(id))
			}
		})
	}
}

// retries counts the later attempts to restore limits.
type retries struct {
	Updates
	added atomic.Int64
}

func (r *retries) AddUpdated(id model.ContainerID, delay time.Duration) {
	if delay == keepRetry {
		r.added.Add(1)
	}
	r.Updates.AddUpdated(id, delay)
}

// TestSystemdDoesNotKeepLimits: a container starts and is updated while systemd does not answer.
// Its limits are set, and kept later.
func TestSystemdDoesNotKeepLimits(t *testing.T) {
	s, w := newService(t)
	queue := retries{Updates: s.Updates}
	s.Updates = &queue
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	w.setEngineFault(func(verb string, _ bool) error {
		if verb == "limit" {
			return fmt.Errorf("systemd: %w", errdefs.ErrUnavailable)
		}
		return nil
	})

	id := started(t, s, limited(pod, cfg))
	if !w.runs(t, id) || queue.added.Load() != 1 {
		t.Errorf("running: %v, %d retries", w.runs(t, id), queue.added.Load())
	}

	if _, err := s.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: id,
		Linux:       &runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.high": "2000"}},
	}); err != nil {
		t.Error(err)
	}
	if n := queue.added.Load(); n < 2 {
		t.Errorf("%d retries", n)
	}
}

// TestStatusHasLimits: a status right after the start has the limits of the start, one right after
// an update those of the update.
func TestStatusHasLimits(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	id := started(t, s, limited(pod, cfg))
	check := func(when, want string) {
		t.Helper()
		c, err := s.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			t.Fatal(err)
		}
		p, err := s.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
		if err != nil {
			t.Fatal(err)
		}

		for _, st := range append(p.ContainersStatuses, c.Status) {
			if got := st.GetResources().GetLinux().GetUnified()["memory.high"]; got != want {
				t.Errorf("%s: memory.high is %q, want %q", when, got, want)
			}
		}
	}
	check("after the start", "1000")

	// Somebody changes the file.
	if err := w.engine.Limit(t.Context(), &model.Container{ID: model.ContainerID(id)}, model.KernelLimits{
		Unified: map[model.UnifiedKey]string{"memory.high": "2000"},
	}); err != nil {
		t.Fatal(err)
	}
	check("after a change by hand", "2000")
}
