package cri

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
	"cri-dockerd/internal/validate"
)

// With Docker's systemd driver, systemd and the OCI runtime write files of a container's control
// group with their own values, at each daemon-reload and each update through the engine.

const (
	// keepWorkers is the number of containers whose limits are restored at the same time.
	keepWorkers = 4
	// keepRetry is the delay before limits are restored again after a failure.
	keepRetry = 15 * time.Second
	// keepLogInterval is the minimum time between two warnings that systemd does not answer.
	keepLogInterval = time.Minute
)

// LimitKeeper restores the limits of containers after somebody may have replaced them.
type LimitKeeper struct{ *Service }

// Run runs until ctx ends.
func (s LimitKeeper) Run(ctx context.Context) {
	var g errgroup.Group
	defer func() { _ = g.Wait() }()

	for range keepWorkers {
		g.Go(func() error {
			for {
				id, err := s.Updates.NextUpdated(ctx)
				if err != nil {
					return nil
				}
				s.restore(ctx, id)
			}
		})
	}

	for {
		select {
		case <-ctx.Done():
			return
		case <-s.Engine.LimitsLost():
		}

		for _, c := range s.View.Containers() {
			if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
				s.Updates.AddUpdated(c.ID, 0)
			}
		}
	}
}

// restore restores the limits of one container, and tries again later if that fails.
func (s LimitKeeper) restore(ctx context.Context, id model.ContainerID) {
	ctx, cancel := context.WithTimeout(ctx, undoDeadline)
	defer cancel()

	c, err := s.lockContainer(ctx, string(id))
	if err != nil {
		if !errdefs.IsNotFound(err) {
			s.Updates.AddUpdated(id, keepRetry)
		}
		return
	}
	defer c.unlock()

	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return
	}

	if err := s.keepLater(id, s.Engine.KeepLimits(ctx, c.Container)); err != nil {
		s.Log.Warn("failed to restore the limits of a container", "container", id, "retry", keepRetry, "err", err)
		s.Updates.AddUpdated(id, keepRetry)
	}
}

// keepLater handles limits that are set, but that systemd has not confirmed to keep (Unavailable):
// restore tries again. It returns all other errors.
func (s LimitKeeper) keepLater(id model.ContainerID, err error) error {
	if !errdefs.IsUnavailable(err) {
		return err
	}

	s.unkept.Do(func() {
		s.Log.Warn("the limits of a container are set, but systemd does not keep them yet; "+
			"check that systemd answers (systemctl is-system-running)", "container", id, "retry", keepRetry, "err", err)
	})
	s.Updates.AddUpdated(id, keepRetry)

	return nil
}

// set sets resources of a locked container. After an error some of them may be set.
func (s LimitKeeper) set(
	ctx context.Context, c *lockedContainer, r *runtimeapi.LinuxContainerResources, others model.PluginResources,
	host model.Host,
) error {
	if err := validate.Update(r, host); err != nil {
		return err
	}

	update, err := translate.NewUpdate(r, host)
	if err != nil {
		return err
	}

	update.Add(others)
	for _, w := range update.Warnings {
		s.Log.Warn(w, "container", c.ID)
	}

	// Apply the limits of the start first: CompleteStarts may not have finished an interrupted
	// start yet.
	adjusted, err := s.withAdjusted(c.Container)
	if err != nil {
		return err
	}

	if err := s.keepLater(c.ID, s.Engine.LimitStarted(ctx, adjusted)); err != nil {
		return err
	}

	if err := s.Engine.Update(ctx, c.ID, update); err != nil {
		return err
	}

	// Even without changes to the other limits: an update by the engine may replace them.
	renewErr := s.renew(ctx, c)
	if err := s.keepLater(c.ID, s.Engine.Limit(ctx, c.Container, update.Kernel)); err != nil {
		return errors.Join(err, renewErr)
	}

	return renewErr
}

// withAdjusted returns the record of a container with the kernel limits that plugins have set.
func (s LimitKeeper) withAdjusted(c *model.Container) (*model.Container, error) {
	if !c.Plugged.Required {
		return c, nil
	}

	a, err := s.PluginStore.Adjustment(c.ID)
	if err != nil || a.Resources() == nil {
		return c, err
	}

	update, err := translate.NewUpdate(a.Resources(), s.View.Engine().Host)
	if err != nil {
		return c, err
	}

	out := *c
	out.Kernel = c.Kernel.With(update.Kernel)

	return &out, nil
}
