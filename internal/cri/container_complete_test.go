package cri

import (
	"context"
	"errors"
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

// giveUpStart calls StartContainer with a caller giving up before the engine has started the
// container.
func giveUpStart(t *testing.T, s *Service, w *world, r *runtimeapi.CreateContainerRequest) (id string) {
	t.Helper()
	c, err := s.CreateContainer(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}

	w.setEngineFault(func(verb string, after bool) error {
		if verb == "start" && !after {
			return fmt.Errorf("the caller has disconnected: %w", context.DeadlineExceeded)
		}
		return nil
	})

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
		ContainerId: c.ContainerId,
	}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("start by a disconnected caller: %v", err)
	}

	w.setEngineFault(nil)
	w.set(w.logs, c.ContainerId, false) // as if it had not been created

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

// TestLateStartIsCompleted: the engine starts a container after StartContainer has failed. The
// container gets its log and its limits.
func TestLateStartIsCompleted(t *testing.T) {
	s, w := newService(t)
	follow(t, s)
	cfg := w.pod()
	id := giveUpStart(t, s, w, limited(runPod(t, s, cfg), cfg))
	w.start(t, id)
	eventually(t, func() bool { return w.hasLimits(id) && w.has(w.logs, id) })
	if !w.runs(t, id) {
		t.Error("the container was killed")
	}
}

// TestStartBeforeCrashIsCompleted: a starting daemon finds a running container without its log and
// its limits.
func TestStartBeforeCrashIsCompleted(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	id := giveUpStart(t, s, w, limited(runPod(t, s, cfg), cfg))
	w.start(t, id)
	refresh(t, s, id)
	follow(t, s)
	eventually(t, func() bool { return w.hasLimits(id) && w.has(w.logs, id) })
}

// TestRestartedContainerGetsLimits: an operator restarts a container, and its new cgroup has no
// limits.
func TestRestartedContainerGetsLimits(t *testing.T) {
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

// TestLateStartWithoutLimitsIsKilled kills a container if its limits cannot be set, even if the
// first kill fails.
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

// TestLateStartAfterStopIsKilled: the pod or the container was stopped while the engine had a start
// pending. The view learns of the start last.
func TestLateStartAfterStopIsKilled(t *testing.T) {
	tests := map[string]func(t *testing.T, s *Service, w *world, pod, id string){
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
			s.starts.forget(model.ContainerID(id)) // kept in memory only
			w.engine.End(model.ContainerID(pod), 0)
			refresh(t, s, pod)
			w.start(t, id)
		},
	}

	for name, start := range tests {
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

// TestContainersOfDeadPauseAreKept leaves these containers to the kubelet, with their grace
// periods.
func TestContainersOfDeadPauseAreKept(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	id := started(t, s, limited(pod, cfg))
	w.engine.End(model.ContainerID(pod), 0)
	refresh(t, s, pod)
	if err := (completer{s}).completeStart(t.Context(), model.ContainerID(id)); err != nil || !w.runs(t, id) {
		t.Errorf("the container was killed: %v", err)
	}

	if err := (completer{s}).completeStart(t.Context(), "beef"); err != nil && !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}
