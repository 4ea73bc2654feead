package cri

import (
	"context"
	"errors"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// RemovePodSandbox stops a running pod and removes its containers and sandbox (CRI
// RemovePodSandbox). It succeeds for an unknown ID.
func (s *Service) RemovePodSandbox(
	ctx context.Context, r *runtimeapi.RemovePodSandboxRequest,
) (*runtimeapi.RemovePodSandboxResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	sb, err := s.lockSandbox(ctx, r.GetPodSandboxId())
	if err != nil {
		if err := ignoreNotFound(err); err != nil {
			return nil, fmt.Errorf("remove sandbox: %w", err)
		}
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	defer sb.unlock()

	// Someone may have removed the pause container but not the pod's containers and network.
	if !sb.isKnown() && len(s.View.ContainersOf(sb.ID)) == 0 && !s.Node.Holds(sb.ID) {
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	if err := s.removeSandbox(ctx, sb); err != nil {
		return nil, fmt.Errorf("remove sandbox %s: %w", sb.ID, err)
	}

	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

// removeSandbox removes a sandbox with all its resources. The pause container is removed last:
// while anything remains, the sandbox stays listed and the kubelet retries.
func (s *Service) removeSandbox(ctx context.Context, sb *lockedSandbox) error {
	defer s.Stats.Forget(string(sb.ID))

	if err := s.stopSandbox(ctx, sb); err != nil {
		return err
	}

	s.hooks.podStopped(ctx, sb.ID, s.View.ContainersOf(sb.ID))

	for _, c := range s.View.ContainersOf(sb.ID) {
		if err := s.removeContainerOf(ctx, c.ID); err != nil {
			return err
		}
	}

	if err := s.volumes.collect(ctx); err != nil { // containers may have been removed by someone else
		return err
	}

	if err := ignoreNotFound(s.Engine.Remove(ctx, sb.ID)); err != nil {
		return err
	}

	var err error
	if sb.StartedAt.IsZero() {
		err = s.killForgotten(ctx, sb.ID)
	}

	err = errors.Join(err, s.View.Refresh(ctx, sb.ID), s.PluginStore.Forget(sb.ID))
	s.hooks.podRemoved(ctx, sb.ID)

	return err
}

// removeContainerOf removes a container of a sandbox being removed. It waits for other calls on the
// container: a concurrent start would create its log link again.
func (s *Service) removeContainerOf(ctx context.Context, id model.ContainerID) error {
	c, err := s.lockContainer(ctx, string(id))
	if err != nil {
		return ignoreNotFound(err)
	}
	defer c.unlock()
	return s.removeContainer(ctx, c)
}
