package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
)

// explain adds to a failure of an exec that its container does not run, if that is so: the engine
// reports the same in many ways, depending on which of its parts notices first. The result is
// NotFound or FailedPrecondition then. Other failures stay as they are.
func (r *execution) explain(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil || errdefs.IsUnavailable(err) || errors.Is(err, ErrClientGone) {
		return err
	}

	ctx, cancel := context.WithTimeout(ctx, execInspectTimeout)
	defer cancel()

	in, inspectErr := r.inspect(ctx, string(r.container))
	switch {
	case errdefs.IsNotFound(inspectErr):
		return fmt.Errorf("the container was removed: %w", errdefs.ErrNotFound)
	case inspectErr != nil:
		return err
	}

	if state := stateAgainstExec(in.State); state != "" {
		return fmt.Errorf("the container %s: %w (%s)", state, errdefs.ErrFailedPrecondition, err.Error())
	}

	return err
}

// stateAgainstExec returns why nothing can be executed in a container, "" if its state allows it.
func stateAgainstExec(s *container.State) string {
	switch {
	case s == nil:
		return ""
	case s.Paused:
		return "is paused"
	case s.Restarting:
		return "is being restarted"
	case !s.Running:
		return "does not run"
	case s.Pid > 0 && hasEnded("/proc", s.Pid): // the engine has not noticed yet
		return "has ended"
	}

	return ""
}
