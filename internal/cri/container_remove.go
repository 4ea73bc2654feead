package cri

import (
	"context"
	"errors"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// RemoveContainer removes a container, running or not, and its log link (CRI RemoveContainer). It
// succeeds for an unknown ID.
func (s *Service) RemoveContainer(
	ctx context.Context, r *runtimeapi.RemoveContainerRequest,
) (*runtimeapi.RemoveContainerResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	c, err := s.lockContainer(ctx, r.GetContainerId())
	if err != nil {
		if err := ignoreNotFound(err); err != nil {
			return nil, err
		}
		if err := s.volumes.collect(ctx); err != nil { // the container may have been removed by someone else
			return nil, err
		}
		return &runtimeapi.RemoveContainerResponse{}, nil
	}
	defer c.unlock()

	if err := s.removeContainer(ctx, c); err != nil {
		return nil, err
	}

	return &runtimeapi.RemoveContainerResponse{}, nil
}

// removeContainer removes a container, its log link and its use of image volumes.
func (s *Service) removeContainer(ctx context.Context, c *lockedContainer) error {
	defer s.Stats.Forget(string(c.ID))
	defer s.starts.forget(c.ID)

	if err := ignoreNotFound(s.Engine.Remove(ctx, c.ID)); err != nil {
		return err
	}

	var err error
	if isUnstarted(c.Container) {
		err = s.killForgotten(ctx, c.ID)
	}

	err = errors.Join(err, s.Logs.Removed(ctx, c.Container), s.View.Refresh(ctx, c.ID), s.PluginStore.Forget(c.ID))
	s.hooks.removed(ctx, c.ID)

	var images []model.ImageID
	for _, v := range c.ImageVolumes {
		images = append(images, v.ImageID)
	}

	return errors.Join(err, s.volumes.collect(ctx, images...))
}
