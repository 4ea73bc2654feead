package cri

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// follow runs CompleteStarts until the end of the test.
func follow(t *testing.T, s *Service) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.CompleteStarts(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// giveUpStart is a StartContainer whose caller gives up before the engine has started the
// container.
func giveUpStart(t *testing.T, s *Service, w *world, r *runtimeapi.CreateContainerRequest) (id string) {
	t.Helper()
	c, err := s.CreateContainer(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}

	w.setEngineFault(func(verb string, after bool) error {
		if verb == "start" && !after {
			return fmt.Errorf("the caller has gone: %w", context.DeadlineExceeded)
		}
		return nil
	})

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err ==
		nil {
		t.Fatal("the start succeeded")
	}

	w.setEngineFault(nil)
	w.set(w.logs, c.ContainerId, false) // as if it had not been made

	return c.ContainerId
}

func (w *world) start(t *testing.T, id string) {
	t.Helper()
	if err := w.engine.Start(t.Context(), model.ContainerID(id)); err != nil {
		t.Fatal(err)
	}
}

func (w *world) hasLimits(id string) bool {
	return w.engine.Limits(model.ContainerID(id)).Hugepages["2MB"] == 4<<20
}

func (w *world) runs(t *testing.T, id string) bool {
	t.Helper()
	o, err := w.engine.Inspect(t.Context(), model.ContainerID(id))
	return err == nil && o.Container.State == runtimeapi.ContainerState_CONTAINER_RUNNING
}

// TestLateStartIsCompleted: the engine starts a container after StartContainer has given up. It
// gets its log and its limits.
func TestLateStartIsCompleted(t *testing.T) {
	s, w := newService(t)
	follow(t, s)
	cfg := w.pod()
	id := giveUpStart(t, s, w, limited(runPod(t, s, cfg), cfg))
	w.start(t, id)
	eventually(t, func() bool { return w.hasLimits(id) && w.has(w.logs, id) })
	if !w.runs(t, id) {
		t.Error("it was killed")
	}
}

// TestStartBeforeACrashIsCompleted: a daemon that starts finds a container that runs without its
// log and its limits.
func TestStartBeforeACrashIsCompleted(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	id := giveUpStart(t, s, w, limited(runPod(t, s, cfg), cfg))
	w.start(t, id)
	refresh(t, s, id)
	follow(t, s)
	eventually(t, func() bool { return w.hasLimits(id) && w.has(w.logs, id) })
}

// TestRestartedContainerGetsItsLimits: somebody restarts a container, whose new control group has
// none.
func TestRestartedContainerGetsItsLimits(t *testing.T) {
	s, w := newService(t)
	follow(t, s)
	cfg := w.pod()
	id := started(t, s, limited(runPod(t, s, cfg), cfg))
	if _, err := s.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{OomScoreAdj: 5},
	}); err != nil {
		t.Fatal(err)
	}

	w.engine.End(model.ContainerID(id), 0)
	w.start(t, id)
	eventually(t, func() bool { return w.hasLimits(id) })
}

// TestLateStartWithoutLimitsIsKilled: what cannot get its limits does not run, also when the first
// kill fails.
func TestLateStartWithoutLimitsIsKilled(t *testing.T) {
	s, w := newService(t)
	follow(t, s)
	cfg := w.pod()
	id := giveUpStart(t, s, w, limited(runPod(t, s, cfg), cfg))
	kills := 0
	w.setEngineFault(func(verb string, after bool) error {
		if verb == "stop" && !after {
			kills++
		}
		if verb == "limit" || verb == "stop" && kills == 1 {
			return errBroken
		}
		return nil
	})

	w.start(t, id)
	eventually(t, func() bool { return !w.runs(t, id) })
}

// TestLateStartOfWhatWasStoppedIsKilled: the pod or the container was stopped while the engine had
// the start before it. The view learns of the start last.
func TestLateStartOfWhatWasStoppedIsKilled(t *testing.T) {
	for name, start := range map[string]func(t *testing.T, s *Service, w *world, pod, id string){
		"started before the stop": func(t *testing.T, s *Service, w *world, pod, id string) {
			w.start(t, id)
			w.engine.End(model.ContainerID(pod), 0)
			refresh(t, s, pod)
		},
		"container stopped": func(t *testing.T, s *Service, w *world, _, id string) {
			if _, err := s.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
				t.Fatal(err)
			}
			w.start(t, id)
		},
		"after a crash": func(t *testing.T, s *Service, w *world, pod, id string) {
			s.starts.forget(model.ContainerID(id)) // memory
			w.engine.End(model.ContainerID(pod), 0)
			refresh(t, s, pod)
			w.start(t, id)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, w := newService(t)
			cfg := w.pod()
			pod := runPod(t, s, cfg)
			id := giveUpStart(t, s, w, createRequest(pod, cfg))
			start(t, s, w, pod, id)
			follow(t, s)
			eventually(t, func() bool { return !w.runs(t, id) })
		})
	}
}

// TestContainersOfADeadPauseAreLeftToTheKubelet: it ends them in their own time.
func TestContainersOfADeadPauseAreLeftToTheKubelet(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	id := started(t, s, limited(pod, cfg))
	w.engine.End(model.ContainerID(pod), 0)
	refresh(t, s, pod)
	if err := (completer{s}).completeStart(t.Context(), model.ContainerID(id)); err != nil || !w.runs(t, id) {
		t.Errorf("it was killed: %v", err)
	}

	if err := (completer{s}).completeStart(t.Context(), "beef"); err != nil && !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}
