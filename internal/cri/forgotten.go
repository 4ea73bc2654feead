package cri

import (
	"context"
	"errors"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// An engine that is killed during a container start may not record the start. The container then
// keeps running unnoticed, beside its successor and even after its own removal.

// killForgotten kills the processes of a locked container or sandbox that the engine has no record
// of starting, or has removed. See Engine.KillForgotten.
func (s *Service) killForgotten(ctx context.Context, id model.ContainerID) error {
	killed, err := s.Engine.KillForgotten(ctx, id)
	if killed > 0 {
		s.Log.Warn("killed processes of a container without a recorded start", "container", id, "processes",
			killed)
	}
	return err
}

// recoverForgotten kills the processes of containers without a recorded start. For sandboxes,
// recoverSandboxes does so with the removal.
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
		return ignoreNotFound(err)
	}
	defer c.unlock()

	if !isUnstarted(c.Container) {
		return nil
	}

	return r.killForgotten(ctx, id)
}

// isUnstarted reports whether the engine has no record of a start of the container.
func isUnstarted(c *model.Container) bool {
	return c.State != runtimeapi.ContainerState_CONTAINER_RUNNING && c.StartedAt.IsZero()
}
