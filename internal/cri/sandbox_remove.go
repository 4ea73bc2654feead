package cri

import (
	"cmp"
	"context"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// RemovePodSandbox stops a pod if it runs and removes its containers and sandbox (CRI RemovePodSandbox). An unknown ID is a success.
func (s *Service) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	sb, err := s.View.Sandbox(r.GetPodSandboxId())
	if err != nil {
		if err := notFoundIsFine(err); err != nil {
			return nil, err
		}
		// The pause was removed behind our back; its containers may be left.
		id, err := model.ParseContainerID(r.GetPodSandboxId())
		if err != nil || len(s.View.ContainersOf(id)) == 0 && !s.holdsNetwork(id) {
			return &runtimeapi.RemovePodSandboxResponse{}, nil //nolint:nilerr // no sandbox has another ID
		}
		sb = &spec.Sandbox{ID: id}
	}
	unlock, err := s.names.Lock(ctx, cmp.Or(sb.Name, string(sb.ID)))
	if err != nil {
		return nil, fmt.Errorf("remove sandbox %s: %w", sb.ID, err)
	}
	defer unlock()
	if err := s.removeSandbox(ctx, sb); err != nil {
		return nil, fmt.Errorf("remove sandbox %s: %w", sb.ID, err)
	}
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

// removeSandbox undoes all that a sandbox is. The pause goes last: as long as anything is left, the sandbox stays listed and the kubelet
// tries again.
func (s *Service) removeSandbox(ctx context.Context, sb *spec.Sandbox) error {
	defer s.Stats.Forget(string(sb.ID))
	if err := s.stopSandbox(ctx, sb); err != nil {
		return err
	}
	for _, c := range s.View.ContainersOf(sb.ID) {
		if err := s.removeContainerOf(ctx, c); err != nil {
			return err
		}
	}
	if err := s.collectImageVolumes(ctx); err != nil { // containers may have been removed behind our back
		return err
	}
	if err := notFoundIsFine(s.Engine.Remove(ctx, sb.ID)); err != nil {
		return err
	}
	return s.View.Refresh(ctx, sb.ID)
}

// removeContainerOf removes a container of a sandbox that goes. It waits for calls on the container: one that starts it would make its log
// link again.
func (s *Service) removeContainerOf(ctx context.Context, c *spec.Container) error {
	unlock, err := s.names.Lock(ctx, c.Name)
	if err != nil {
		return fmt.Errorf("remove container %s: %w", c.ID, err)
	}
	defer unlock()
	return s.removeContainer(ctx, c)
}
