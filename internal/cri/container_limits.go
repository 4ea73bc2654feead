package cri

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
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
