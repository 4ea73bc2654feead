package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// PullImage pulls an image and returns the engine's ID of it, the same as Image.id and ContainerStatus.image_id (CRI PullImage).
func (s *Service) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	host, err := s.begin(r)
	if err != nil {
		return nil, err
	}
	if err := spec.CheckRuntime("image.runtime_handler", r.GetImage().GetRuntimeHandler(), host); err != nil {
		return nil, err
	}
	id, err := s.Engine.Pull(ctx, r.GetImage().GetImage(), r.GetAuth())
	if err != nil {
		return nil, err
	}
	if _, err := s.View.RefreshImage(ctx, string(id)); err != nil {
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: string(id)}, nil
}

// image is the image of this name or ID. One that the view does not know is looked for in the engine, since it may have been built a moment
// ago. NotFound if there is none.
func (s *Service) image(ctx context.Context, ref string) (*spec.Image, error) {
	i, err := s.View.Image(ref)
	if !errdefs.IsNotFound(err) {
		return i, err
	}
	return s.View.RefreshImage(ctx, ref)
}

// ListImages lists images: all, or those that the filter selects by ID, name, repository or pattern (CRI ListImages).
func (s *Service) ListImages(ctx context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	resp, err := s.listImages(ctx, r)
	if err != nil {
		return nil, err
	}
	fitImages(resp.Images, maxList)
	return resp, nil
}

// listImages is ListImages of any size.
func (s *Service) listImages(ctx context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	ref := r.GetFilter().GetImage().GetImage()
	filter, err := spec.ParseImageFilter(ref)
	if err != nil {
		return nil, err
	}

	resp, err := s.matchingImages(filter)
	if err != nil || len(resp.Images) > 0 || ref == "" || filter.IsPattern() {
		return resp, err
	}

	// An image that was built a moment ago becomes known here.
	if _, err := s.image(ctx, ref); err != nil {
		return resp, notFoundIsFine(err)
	}
	return s.matchingImages(filter)
}

func (s *Service) matchingImages(filter spec.ImageFilter) (*runtimeapi.ListImagesResponse, error) {
	images, err := s.View.Images()
	if err != nil {
		return nil, err
	}

	resp := &runtimeapi.ListImagesResponse{}
	for _, i := range images {
		if filter.Match(i) {
			resp.Images = append(resp.Images, i.CRI())
		}
	}
	return resp, nil
}

// ImageStatus describes an image; one that is not there is an empty answer, no error (CRI ImageStatus).
func (s *Service) ImageStatus(ctx context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	i, err := s.image(ctx, r.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	} else if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ImageStatusResponse{Image: i.CRI()}
	if r.GetVerbose() {
		resp.Info, err = verbose(map[string]any{"labels": i.Labels, "user": i.User})
	}
	return resp, err
}

// RemoveImage removes an image with all its names, by ID, tag or digest (CRI RemoveImage). One that is not there is a success; one that a
// container uses is FailedPrecondition and keeps its names. Pinned ones are removed too: a pin is only a recommendation.
func (s *Service) RemoveImage(ctx context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	i, err := s.image(ctx, r.GetImage().GetImage())
	if err == nil {
		err = s.removeImage(ctx, i.ID)
	}
	if err = notFoundIsFine(err); err != nil {
		return nil, fmt.Errorf("remove image %s: %w", r.GetImage().GetImage(), err)
	}
	return &runtimeapi.RemoveImageResponse{}, nil
}

func (s *Service) removeImage(ctx context.Context, id model.ImageID) error {
	unlock, err := s.names.Lock(ctx, string(id))
	if err != nil {
		return err
	}
	defer unlock()
	i, err := s.View.Image(string(id))
	if err != nil {
		return err // another call has removed it
	}
	// The engine would take away all names but the last before it finds the user.
	if users, err := s.Engine.ImageUsers(ctx, id); err != nil {
		return err
	} else if len(users) > 0 {
		return fmt.Errorf("it is used by container %s: %w", strings.Join(users, ", "), errdefs.ErrFailedPrecondition)
	}
	if s.usesImageVolume(id) {
		return fmt.Errorf("it is mounted into a container: %w", errdefs.ErrFailedPrecondition)
	}
	// An image with names in several repositories cannot be removed by its ID without force; its names are removed one by one, and the
	// last takes the image with it.
	for _, ref := range slices.Concat(i.RepoTags, i.RepoDigests, []string{string(i.ID)}) {
		if err := notFoundIsFine(s.Engine.RemoveImage(ctx, ref)); err != nil {
			_, refreshErr := s.View.RefreshImage(ctx, string(id)) // it may have lost names
			return errors.Join(err, notFoundIsFine(refreshErr))
		}
	}
	s.View.ForgetImage(id)
	return nil
}

// ImageFsInfo reports the disk usage of images and of the writable layers of containers (CRI
// ImageFsInfo).
func (s *Service) ImageFsInfo(
	_ context.Context, r *runtimeapi.ImageFsInfoRequest,
) (*runtimeapi.ImageFsInfoResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	return s.Stats.ImageFileSystem()
}
