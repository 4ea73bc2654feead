package cri

import (
	"context"
	"errors"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// RemovePodSandbox stops a pod if it runs and removes its containers and sandbox (CRI
// RemovePodSandbox). An unknown ID is a success.
func (s *Service) RemovePodSandbox(
	ctx context.Context, r *runtimeapi.RemovePodSandboxRequest,
) (*runtimeapi.RemovePodSandboxResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}

	sb, err := s.lockSandbox(ctx, r.GetPodSandboxId())
	if err != nil {
		if err := notFoundIsFine(err); err != nil {
			return nil, fmt.Errorf("remove sandbox: %w", err)
		}
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	defer sb.unlock()

	// Somebody may have removed the pause; its containers and its network may be left.
	if !sb.isKnown() && len(s.View.ContainersOf(sb.ID)) == 0 && !s.Node.Holds(sb.ID) {
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	if err := s.removeSandbox(ctx, sb); err != nil {
		return nil, fmt.Errorf("remove sandbox %s: %w", sb.ID, err)
	}

	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

// removeSandbox undoes all that a sandbox is. The pause goes last: as long as anything is left, the
// sandbox stays listed and the kubelet tries again.
func (s *Service) removeSandbox(ctx context.Context, sb *lockedSandbox) error {
	defer s.Stats.Forget(string(sb.ID))

	if err := s.stopSandbox(ctx, sb); err != nil {
		return err
	}

	for _, c := range s.View.ContainersOf(sb.ID) {
		if err := s.removeContainerOf(ctx, c.ID); err != nil {
			return err
		}
	}

	if err := s.volumes.collect(ctx); err != nil { // containers may have been removed behind our back
		return err
	}

	if err := notFoundIsFine(s.Engine.Remove(ctx, sb.ID)); err != nil {
		return err
	}

	var err error
	if sb.StartedAt.IsZero() {
		err = s.killForgotten(ctx, sb.ID)
	}

	return errors.Join(err, s.View.Refresh(ctx, sb.ID))
}

// removeContainerOf removes a container of a sandbox that goes. It waits for calls on the
// container: one that starts it would make its log link again.
func (s *Service) removeContainerOf(ctx context.Context, id model.ContainerID) error {
	c, err := s.lockContainer(ctx, string(id))
	if err != nil {
		return notFoundIsFine(err)
	}
	defer c.unlock()
	return s.removeContainer(ctx, c)
}
