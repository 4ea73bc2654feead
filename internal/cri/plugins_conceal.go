package cri

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// recoverUnfinished removes containers whose plugins had not completed when the daemon was killed:
// nobody has their IDs. For sandboxes, recoverSandboxes does so. It also removes the files of
// removed objects.
func (r recovery) recoverUnfinished(ctx context.Context) error {
	var errs []error
	for _, c := range r.View.Containers() {
		if r.Concealer.IsConcealed(c.ID) {
			errs = append(errs, r.removeUnfinished(ctx, c))
		}
	}

	for _, id := range r.PluginStore.IDs() {
		if removed, err := r.isForgotten(ctx, id); err != nil {
			errs = append(errs, err)
		} else if removed {
			errs = append(errs, r.PluginStore.Forget(id))
		}
	}

	return errors.Join(errs...)
}

// removeUnfinished removes one container, unless a call still creates it.
func (r recovery) removeUnfinished(ctx context.Context, c *model.Container) error {
	ctx, cancel := context.WithTimeout(ctx, recoveryWait)
	defer cancel()

	unlock, err := r.lockName(ctx, c.Name)
	if err != nil {
		return err
	}
	defer unlock()

	now, err := r.lockContainer(ctx, string(c.ID))
	if err != nil {
		return ignoreNotFound(err)
	}
	defer now.unlock()

	if !r.Concealer.IsConcealed(c.ID) {
		return nil
	}
	r.Log.Info("removing an unfinished container", "container", c.ID, "name", c.Name)

	return r.removeContainer(ctx, now)
}

// isForgotten reports whether the engine has no object with this ID.
func (r recovery) isForgotten(ctx context.Context, id model.ContainerID) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, recoveryWait)
	defer cancel()

	_, err := r.Engine.Inspect(ctx, id)
	if errdefs.IsNotFound(err) {
		return true, nil
	}
	return false, err
}
