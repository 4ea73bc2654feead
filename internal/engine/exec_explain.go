package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
)

// explain replaces the error of an exec by NotFound or FailedPrecondition if the container is not
// running. The engine reports this case with many different errors, depending on the component that
// detects it. explain returns other errors unchanged.
func (r *execution) explain(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil || errdefs.IsUnavailable(err) || errors.Is(err, ErrClientDisconnected) {
		return err
	}

	ctx, cancel := context.WithTimeout(ctx, execInspectTimeout)
	defer cancel()

	in, inspectErr := r.inspect(ctx, string(r.container))
	switch {
	case errdefs.IsNotFound(inspectErr):
		return fmt.Errorf("container was removed: %w", errdefs.ErrNotFound)
	case inspectErr != nil:
		return err
	}

	if reason := execObstacle(in.State); reason != "" {
		return fmt.Errorf("container %s: %w (%s)", reason, errdefs.ErrFailedPrecondition, err.Error())
	}

	return err
}

// execObstacle returns the reason why an exec is not possible in a container, or "" if the state of
// the container permits it.
func execObstacle(s *container.State) string {
	switch {
	case s == nil:
		return ""
	case s.Paused:
		return "is paused"
	case s.Restarting:
		return "is being restarted"
	case !s.Running:
		return "is not running"
	case s.Pid > 0 && hasEnded("/proc", s.Pid): // the engine has not processed the exit yet
		return "has exited"
	}

	return ""
}
