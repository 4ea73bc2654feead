package cri

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// TestForgottenStarts: processes of a container without a recorded start are killed by recovery, by
// a failing start, and by the removal of the container or its pod. A container with a recorded
// start keeps its processes.
func TestForgottenStarts(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, s *Service, w *world, pod, container string) error{
		"recovery": func(t *testing.T, s *Service, _ *world, _, _ string) error { return s.Recover(t.Context()) },
		"a start that fails": func(t *testing.T, s *Service, w *world, _, container string) error {
			w.setEngineFault(func(verb string, after bool) error {
				if verb == "start" && !after {
					return errdefs.ErrInternal
				}
				return nil
			})

			_, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: container})
			if !errdefs.IsInternal(err) {
				t.Errorf("start: error %v, want Internal", err)
			}

			return nil
		},
		"RemoveContainer": func(t *testing.T, s *Service, _ *world, _, container string) error {
			_, err := s.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: container})
			return err
		},
		"RemovePodSandbox": func(t *testing.T, s *Service, _ *world, pod, _ string) error {
			_, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, w := newService(t)
			cfg := w.pod()
			pod := runPod(t, s, cfg)
			running := started(t, s, createRequest(pod, cfg))
			second := createRequest(pod, cfg)
			second.Config.Metadata.Attempt = 1
			created, err := s.CreateContainer(t.Context(), second)
			if err != nil {
				t.Fatal(err)
			}

			w.engine.Forget(model.ContainerID(created.ContainerId), 2)
			w.engine.Forget(model.ContainerID(running), 2)

			if err := end(t, s, w, pod, created.ContainerId); err != nil {
				t.Fatal(err)
			}

			if n := w.engine.Forgotten(model.ContainerID(created.ContainerId)); n != 0 {
				t.Errorf("%d processes of the container are running", n)
			}
			if w.engine.Forgotten(model.ContainerID(running)) != 2 {
				t.Error("processes of a running container were killed")
			}
		})
	}
}

// TestForgottenPause: removing a sandbox after a failed start kills its pause process.
func TestForgottenPause(t *testing.T) {
	s, w := newService(t)
	var pause model.ContainerID
	w.setEngineFault(func(verb string, after bool) error {
		if verb != "start" || after {
			return nil
		}

		all, err := w.engine.Objects(t.Context())
		if err != nil || len(all) != 1 {
			return fmt.Errorf("the engine has %d containers, %w", len(all), err)
		}

		pause = all[0].Sandbox.ID
		w.engine.Forget(pause, 1)

		return errdefs.ErrInternal
	})

	if _, err := s.RunPodSandbox(t.Context(),
		&runtimeapi.RunPodSandboxRequest{Config: w.pod()}); !errdefs.IsInternal(err) {
		t.Fatalf("RunPodSandbox: error %v, want Internal", err)
	}

	if n := w.engine.Forgotten(pause); pause == "" || n != 0 {
		t.Errorf("%d processes of pause container %s are running", n, pause)
	}
}
