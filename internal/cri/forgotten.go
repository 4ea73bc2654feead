package cri

import (
	"context"
	"errors"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// An engine that is killed while it starts a container may forget that it has started it. The
// container then runs beside the next one of its name, and after its removal.

// killForgotten kills what runs of a locked container or sandbox that the engine has not started by
// its own account, or has removed. See Engine.KillForgotten.
func (s *Service) killForgotten(ctx context.Context, id model.ContainerID) error {
	killed, err := s.Engine.KillForgotten(ctx, id)
	if killed > 0 {
		s.Log.Warn("killed processes of a container that the engine did not know to run", "container", id, "processes",
			killed)
	}
	return err
}

// recoverForgotten kills what runs of containers that were never started. Of sandboxes, the removal
// of half-made ones does.
func (r recovery) recoverForgotten(ctx context.Context) error {
	containers := r.View.Containers()
	errs := make([]error, len(containers))
	var g errgroup.Group
	g.SetLimit(recoveriesAtOnce)
	for i, c := range containers {
		if isUnstarted(c) {
			g.Go(func() error { errs[i] = r.recoverUnstarted(ctx, c.ID); return nil })
		}
	}

	_ = g.Wait()

	return errors.Join(errs...)
}

func (r recovery) recoverUnstarted(ctx context.Context, id model.ContainerID) error {
	ctx, cancel := context.WithTimeout(ctx, recoveryWait)
	defer cancel()

	c, err := r.lockContainer(ctx, string(id))
	if err != nil {
		return notFoundIsFine(err)
	}
	defer c.unlock()

	if !isUnstarted(c.Container) {
		return nil
	}

	return r.killForgotten(ctx, id)
}

// isUnstarted reports whether a container was never started, as far as the engine knows.
func isUnstarted(c *spec.Container) bool {
	return c.State != runtimeapi.ContainerState_CONTAINER_RUNNING && c.StartedAt.IsZero()
}
