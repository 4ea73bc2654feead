package cri

import (
	"context"
	"errors"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/translate"
	"cri-dockerd/internal/validate"
)

// UpdateContainerResources changes a container's limits (CRI UpdateContainerResources). A request
// without Linux resources changes nothing. A failed call may have applied some of the changes; the
// kubelet repeats it.
func (s *Service) UpdateContainerResources(
	ctx context.Context, r *runtimeapi.UpdateContainerResourcesRequest,
) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	host, err := s.host()
	if err != nil {
		return nil, err
	}

	c, err := s.lockContainer(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	defer c.unlock()

	if r.GetLinux() == nil {
		return &runtimeapi.UpdateContainerResourcesResponse{}, nil
	}

	if err := validate.Update(r.GetLinux(), host); err != nil {
		return nil, err
	}

	update, err := translate.NewUpdate(r.GetLinux(), host)
	if err != nil {
		return nil, err
	}

	for _, w := range update.Warnings {
		s.Log.Warn(w, "container", c.ID)
	}

	// Apply the limits of the start first: CompleteStarts may not have finished an interrupted
	// start yet.
	keeper := LimitKeeper{s}
	if err := keeper.keepLater(c.ID, s.Engine.LimitStarted(ctx, c.Container)); err != nil {
		return nil, err
	}

	if err := s.Engine.Update(ctx, c.ID, update); err != nil {
		return nil, err
	}

	// Even without changes to the other limits: an update by the engine may replace them.
	renewErr := s.renew(ctx, c)
	if err := keeper.keepLater(c.ID, s.Engine.Limit(ctx, c.Container, update.Kernel)); err != nil {
		return nil, errors.Join(err, renewErr)
	}

	return &runtimeapi.UpdateContainerResourcesResponse{}, renewErr
}
