package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
)

// ExecSync runs a command in a container and returns its output and exit code (CRI ExecSync). After
// timeout seconds, if not 0, it kills the command with all its descendants and returns
// DeadlineExceeded.
func (s *Service) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	c, err := s.runningContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}

	if r.GetTimeout() > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(min(r.GetTimeout(), int64(maxGrace/time.Second)))*
			time.Second)
		defer cancel()
	}

	ctx, stop := s.WhileRunning(ctx, string(c.ID))
	defer stop()

	stdout, stderr := limitedBuffer{budget: &s.outputs}, limitedBuffer{budget: &s.outputs}
	defer stdout.release()
	defer stderr.release()

	code, err := s.Engine.Exec(ctx, c.ID,
		engine.Exec{Cmd: r.GetCmd(), Streams: engine.Streams{Stdout: &stdout, Stderr: &stderr}})
	if err != nil {
		return nil, err
	}

	if err := errors.Join(stdout.err(), stderr.err()); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.ID, err)
	}

	out, errOut := truncateOutputs(stdout.bytes(), stderr.bytes(), outputLimit)

	return &runtimeapi.ExecSyncResponse{Stdout: out, Stderr: errOut, ExitCode: int32(code)}, nil
}

// truncateOutputs truncates two outputs to limit bytes together. Each output keeps at least half of
// the limit if it is that long.
func truncateOutputs(a, b []byte, limit int) (_, _ []byte) {
	a = a[:min(len(a), max(limit/2, limit-len(b)))]
	return a, b[:min(len(b), limit-len(a))]
}

// runningContainer returns a running container, or NotFound or FailedPrecondition.
func (g *gate) runningContainer(id string) (*model.Container, error) {
	c, err := g.view.Container(id)
	if err != nil {
		return nil, err
	}

	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, fmt.Errorf("container %s is not running (%s): %w", c.ID, c.State, errdefs.ErrFailedPrecondition)
	}

	return c, nil
}
