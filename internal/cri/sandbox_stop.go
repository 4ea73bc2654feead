package cri

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// StopPodSandbox force-stops all containers of a pod and releases its network (CRI StopPodSandbox).
// It is idempotent and succeeds for an unknown ID. It works even if the pause process has ended or
// its container was removed.
func (s *Service) StopPodSandbox(
	ctx context.Context, r *runtimeapi.StopPodSandboxRequest,
) (*runtimeapi.StopPodSandboxResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	sb, err := s.lockSandbox(ctx, r.GetPodSandboxId())
	if err != nil {
		if err := ignoreNotFound(err); err != nil {
			return nil, fmt.Errorf("stop sandbox: %w", err)
		}
		return &runtimeapi.StopPodSandboxResponse{}, nil
	}
	defer sb.unlock()

	if err := s.stopSandbox(ctx, sb); err != nil {
		return nil, fmt.Errorf("stop sandbox %s: %w", sb.ID, err)
	}
	s.hooks.podStopped(ctx, sb.ID, s.View.ContainersOf(sb.ID))

	return &runtimeapi.StopPodSandboxResponse{}, nil
}

// stopSandbox kills all containers and the pause container, and releases the network in parallel.
func (s *Service) stopSandbox(ctx context.Context, sb *lockedSandbox) error {
	if !sb.isKnown() {
		return s.stopOrphans(ctx, sb)
	}

	var g errgroup.Group // without a context: one failure must not stop the others
	errs := make([]error, 2)
	g.Go(func() error { errs[0] = s.killAll(ctx, s.View.ContainersOf(sb.ID), sb.Sandbox); return nil })
	g.Go(func() error { errs[1] = s.Network.Disconnect(ctx, sb.Sandbox); return nil })
	_ = g.Wait()

	// Repeat for a container with a start in progress. Either this call sees it running, or its
	// StartContainer sees the stopped pause container.
	return errors.Join(append(errs, s.killAll(ctx, s.View.ContainersOf(sb.ID), nil))...)
}

// killAll kills running containers and optionally the pause container, and refreshes the view.
func (s *Service) killAll(ctx context.Context, containers []*model.Container, pause *model.Sandbox) error {
	var ids []model.ContainerID
	for _, c := range containers {
		if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			ids = append(ids, c.ID)
		}
	}

	if pause != nil && pause.Running {
		ids = append(ids, pause.ID)
	}

	var g errgroup.Group
	errs := make([]error, len(ids))
	for i, id := range ids {
		g.Go(func() error { errs[i] = ignoreNotFound(s.Engine.Stop(ctx, id, 0)); return nil })
	}

	_ = g.Wait()

	return errors.Join(append(errs, s.View.Refresh(ctx, ids...))...)
}

// stopOrphans stops the remaining containers of a pod without a pause container.
func (s *Service) stopOrphans(ctx context.Context, sb *lockedSandbox) error {
	errs := []error{s.killAll(ctx, s.View.ContainersOf(sb.ID), nil)}
	if s.Node.Holds(sb.ID) {
		errs = append(errs, s.Network.Disconnect(ctx, sb.Sandbox))
	}
	return errors.Join(errs...)
}
