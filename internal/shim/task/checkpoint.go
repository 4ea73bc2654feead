package task

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// specFile is the OCI spec of a checkpointed container, beside the directory of the images.
const specFile = "spec.dump"

// Checkpoint writes the processes of a container into a directory by criu, and the container's spec
// beside it. The container continues to run unless the options end it.
func (s *Service) Checkpoint(ctx context.Context, r *api.CheckpointTaskRequest) (*emptypb.Empty, error) {
	if p := s.pause(r.ID); p != nil {
		return nil, refuse("checkpoint of pause %s: it has no state", r.ID)
	}

	if _, err := exec.LookPath("criu"); err != nil {
		return nil, refuse("checkpoint of %s: install criu where containerd finds it: %v", r.ID, err)
	}

	s.mu.Lock()
	dir := s.containers[r.ID].bundle
	s.mu.Unlock()
	resp, err := s.TTRPCTaskService.Checkpoint(ctx, r)
	if err != nil || dir == "" {
		return resp, err
	}

	if err := copySpec(dir, filepath.Dir(r.Path)); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("checkpoint of %s: copy the spec: %w", r.ID, err))
	}

	return resp, nil
}

// copySpec copies the spec of a bundle into a directory.
func copySpec(bundle, dir string) error {
	from, err := os.OpenRoot(bundle)
	if err != nil {
		return err
	}
	defer from.Close()

	spec, err := from.ReadFile("config.json")
	if err != nil {
		return err
	}

	to, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer to.Close()

	return to.WriteFile(specFile, spec, 0o600)
}
