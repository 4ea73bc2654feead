package cri

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// TestFailedCheckpoint expects no files after a failure of each step, and for criu's failure its
// own errors.
func TestFailedCheckpoint(t *testing.T) {
	for _, step := range []string{"checkpoint", "layer"} {
		t.Run(step, func(t *testing.T) {
			s, w := newService(t)
			cfg := w.pod()
			id := started(t, s, createRequest(runPod(t, s, cfg), cfg))
			w.setEngineFault(func(verb string, after bool) error {
				if verb == step && after {
					return errdefs.ErrInternal
				}
				return nil
			})

			dir := t.TempDir()
			c, err := s.View.Container(id)
			if err != nil {
				t.Fatal(err)
			}

			err = s.checkpoints.take(t.Context(), c, &model.Sandbox{}, filepath.Join(dir, "a.tar"))
			w.setEngineFault(nil)
			if !errors.Is(err, errdefs.ErrInternal) {
				t.Errorf("error %v", err)
			}
			if step == "checkpoint" && !strings.Contains(err.Error(), "criu/fake.c") {
				t.Errorf("error %v lacks that of criu", err)
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
				t.Errorf("left: %v, %v", entries, err)
			}
		})
	}
}

// TestCheckpointRequests expects a reason for containers that cannot have a checkpoint.
func TestCheckpointRequests(t *testing.T) {
	s, w := newService(t)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	created, err := s.CreateContainer(t.Context(), createRequest(pod, cfg))
	if err != nil {
		t.Fatal(err)
	}

	other := w.pod()
	running := started(t, s, createRequest(runPod(t, s, other), other))
	for name, c := range map[string]struct {
		id string
		is func(error) bool
	}{
		"not running":      {created.ContainerId, errdefs.IsFailedPrecondition},
		"a sandbox":        {pod, errdefs.IsNotFound},
		"without the shim": {running, errdefs.IsFailedPrecondition},
	} {
		location := filepath.Join(t.TempDir(), "a.tar")
		_, err := s.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{
			ContainerId: c.id,
			Location:    location,
		})
		if !c.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
