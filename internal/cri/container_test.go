package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// started returns a running container.
func started(t *testing.T, s *Service, r *runtimeapi.CreateContainerRequest) string {
	t.Helper()
	c, err := s.CreateContainer(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
		ContainerId: c.ContainerId,
	}); err != nil {
		t.Fatal(err)
	}

	return c.ContainerId
}

// limited requests limits beyond Docker's API.
func limited(pod string, cfg *runtimeapi.PodSandboxConfig) *runtimeapi.CreateContainerRequest {
	r := createRequest(pod, cfg)
	r.Config.Linux = &runtimeapi.LinuxContainerConfig{Resources: &runtimeapi.LinuxContainerResources{
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}},
		Unified:        map[string]string{"memory.high": "1000"},
	}}
	return r
}

func TestLimitsBeyondDockerAPI(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	id := started(t, s, limited(runPod(t, s, cfg), cfg))
	if l := w.engine.Limits(model.ContainerID(id)); l.Hugepages["2MB"] != 4<<20 || l.Unified["memory.high"] != "1000" ||
		l.OOMScoreAdj != 0 {
		t.Errorf("limits after the start: %v", l)
	}

	for _, r := range []*runtimeapi.LinuxContainerResources{nil, {}} {
		if _, err := s.UpdateContainerResources(t.Context(),
			&runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: r}); err != nil {
			t.Errorf("update with %v: %v", r, err)
		}
	}

	_, err := s.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id,
		Linux: &runtimeapi.LinuxContainerResources{
			OomScoreAdj: 321, Unified: map[string]string{"memory.high": "2000"},
		}})
	if l := w.engine.Limits(model.ContainerID(id)); err != nil || l.OOMScoreAdj != 321 ||
		l.Unified["memory.high"] != "2000" {
		t.Errorf("limits after the update: %v, %v", l, err)
	}
}

func TestContainerWithoutLimitsIsKilled(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	c, err := s.CreateContainer(t.Context(), limited(runPod(t, s, cfg), cfg))
	if err != nil {
		t.Fatal(err)
	}

	w.setEngineFault(func(verb string, _ bool) error {
		if verb == "limit" {
			return errBroken
		}
		return nil
	})

	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
		ContainerId: c.ContainerId,
	}); !errors.Is(err, errBroken) {
		t.Errorf("start with a failing limit: %v", err)
	}

	st, err := s.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: c.ContainerId})
	if err != nil || st.Status.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("container is running without its limits: %v, %v", st, err)
	}
}

// TestStopDuringStart blocks a start in progress. A concurrent stop waits for it and stops the
// container.
func TestStopDuringStart(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	c, err := s.CreateContainer(t.Context(), createRequest(runPod(t, s, cfg), cfg))
	if err != nil {
		t.Fatal(err)
	}

	inStart, goOn := make(chan struct{}), make(chan struct{})
	w.setEngineFault(func(verb string, after bool) error {
		if verb == "start" && !after {
			close(inStart)
			<-goOn
		}
		return nil
	})

	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := s.StartContainer(t.Context(),
			&runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
			t.Errorf("StartContainer: %v", err)
		}
	})

	<-inStart
	wg.Go(func() {
		if _, err := s.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{
			ContainerId: c.ContainerId,
		}); err != nil {
			t.Errorf("StopContainer: %v", err)
		}
	})

	close(goOn)
	wg.Wait()
	st, err := s.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: c.ContainerId})
	if err != nil || st.Status.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("the stop had no effect: %v, %v", st, err)
	}
}

// TestPodStoppedDuringStart blocks the start of a container while its pod is stopped. The container
// must not survive the stop.
func TestPodStoppedDuringStart(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
	if err != nil {
		t.Fatal(err)
	}

	w.setEngineFault(func(verb string, after bool) error {
		if verb == "start" && !after {
			_, err := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
			return err
		}
		return nil
	})

	_, err = s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("StartContainer in a pod stopped meanwhile: %v", err)
	}

	st, err := s.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: c.ContainerId})
	if err != nil || st.Status.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container is running in a stopped pod: %v, %v", st, err)
	}
}

// TestPodRemovedDuringCreate removes the pod while a container is created. The container must not
// remain.
func TestPodRemovedDuringCreate(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	w.setEngineFault(func(verb string, after bool) error {
		if verb == "create" && !after {
			_, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
			return err
		}
		return nil
	})

	if r, err := s.CreateContainer(t.Context(), createRequest(pod, cfg)); !errdefs.IsNotFound(err) {
		t.Errorf("CreateContainer in a pod removed meanwhile: %v, %v", r, err)
	}

	w.assertNoLeftovers(t, s)
}

// TestPodRemovedDuringStart removes the pod between a container's start and the creation of its
// log. The log must not remain.
func TestPodRemovedDuringStart(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	c, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
	if err != nil {
		t.Fatal(err)
	}

	removed := make(chan error, 1)
	w.beforeLog = func() {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
			removed <- err
		}()

		select {
		case <-ended:
		case <-time.After(50 * time.Millisecond): // it waits for this function
		}
	}

	_, _ = s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
	if err := <-removed; err != nil {
		t.Errorf("RemovePodSandbox: %v", err)
	}

	w.assertNoLeftovers(t, s)
}

// TestParallelCallsOnOnePod repeats all kinds of calls on one pod concurrently. Whatever they
// return, removing the pod leaves nothing behind.
func TestParallelCallsOnOnePod(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	ctx := t.Context()
	for range 20 {
		pod := runPod(t, s, cfg)
		var wg sync.WaitGroup
		for i := range 8 {
			r := createRequest(pod, cfg)
			r.Config.Metadata.Name = fmt.Sprintf("c%d", i%4) // two callers per name
			wg.Go(func() {
				c, err := s.CreateContainer(ctx, r)
				if err != nil {
					return
				}

				id := c.ContainerId
				_, _ = s.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
				_, _ = s.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
				_, _ = s.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1})
				_, _ = s.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
			})

			wg.Go(func() { _, _ = s.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg}) })
			wg.Go(func() { _, _ = s.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}) })
			wg.Go(func() { _, _ = s.ListContainers(ctx, &runtimeapi.ListContainersRequest{}) })
		}

		wg.Wait()
		l, err := received(s.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}))
		if err != nil || len(l.Items) > 1 {
			t.Fatalf("several sandboxes with one name: %v, %v", l, err)
		}

		for _, p := range l.Items {
			if _, err := s.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
				t.Errorf("RemovePodSandbox: %v", err)
			}
		}

		w.assertNoLeftovers(t, s)
	}
}

func TestUpdatePodSandboxResources(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	cfg.Linux = &runtimeapi.LinuxPodSandboxConfig{
		Overhead:  &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 20},
		Resources: &runtimeapi.LinuxContainerResources{CpuShares: 77},
	}

	pod := runPod(t, s, cfg)
	if _, err := s.UpdatePodSandboxResources(t.Context(),
		&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}

	if _, err := s.UpdatePodSandboxResources(t.Context(),
		&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: "beef"}); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown sandbox: %v", err)
	}

	st, err := s.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil || !strings.Contains(st.Info["info"], `"cpu_shares":77`) ||
		!strings.Contains(st.Info["info"], `"memory_limit_in_bytes":1048576`) {
		t.Errorf("the pod's resources are not recorded: %v, %v", st.GetInfo(), err)
	}
}

func TestCreateDirs(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink("not/yet", link); err != nil {
		t.Fatal(err)
	}

	if err := createDirs([]string{filepath.Join(dir, "a/b"), link, dir}); err != nil {
		t.Fatal(err)
	}

	for _, want := range []string{"a/b", "not/yet", "link"} {
		if s, err := os.Stat(filepath.Join(dir, want)); err != nil || !s.IsDir() {
			t.Errorf("%s: %v, %v", want, s, err)
		}
	}
}

// TestUnreadableUsers expects a container if the engine cannot open the image's files of users or
// refuses to, and for other failures an error without leftovers.
func TestUnreadableUsers(t *testing.T) {
	for kind, created := range map[error]int{
		errdefs.ErrInternal:         1,
		errdefs.ErrPermissionDenied: 1,
		errdefs.ErrNotImplemented:   1,
		errdefs.ErrUnavailable:      0,
		errdefs.ErrDataLoss:         0,
	} {
		t.Run(kind.Error(), func(t *testing.T) {
			s, w := newService(t)
			cfg := w.pod()
			pod := runPod(t, s, cfg)
			before := w.engine.Containers()
			w.setEngineFault(func(verb string, _ bool) error {
				if verb == "accounts" {
					return kind
				}
				return nil
			})

			_, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
			w.setEngineFault(nil)
			if (err == nil) != (created == 1) || err != nil && !errors.Is(err, kind) {
				t.Errorf("CreateContainer: %v", err)
			}
			if n := w.engine.Containers() - before; n != created {
				t.Errorf("%d containers were created, want %d", n, created)
			}
		})
	}
}

// TestCreateWithoutAnInspect checks that a failed create leaves nothing behind if the engine
// answers no read of the container, such as one with labels of many megabytes.
func TestCreateWithoutAnInspect(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	before := w.engine.Containers()
	w.setEngineFault(func(verb string, _ bool) error {
		if verb == "inspect" || verb == "find" {
			return context.DeadlineExceeded
		}
		return nil
	})

	if r, err := s.CreateContainer(t.Context(), createRequest(pod, cfg)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("CreateContainer: %v, %v", r, err)
	}
	if after := w.engine.Containers(); after != before {
		t.Errorf("%d containers, want %d as before", after, before)
	}
}
