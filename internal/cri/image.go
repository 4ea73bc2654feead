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
	"cri-dockerd/internal/validate"
)

// imageService implements runtime.v1.ImageService.
type imageService struct {
	runtimeapi.UnimplementedImageServiceServer
	*gate
	store   Images
	images  ImageView
	stats   Stats
	volumes *imageVolumes
}

// PullImage pulls an image and returns the engine's image ID, identical to Image.id and
// ContainerStatus.image_id (CRI PullImage).
func (x *imageService) PullImage(
	ctx context.Context, r *runtimeapi.PullImageRequest,
) (*runtimeapi.PullImageResponse, error) {
	host, err := x.host()
	if err != nil {
		return nil, err
	}

	if err := validate.RuntimeHandler("image.runtime_handler", r.GetImage().GetRuntimeHandler(), host); err != nil {
		return nil, err
	}

	id, err := x.store.Pull(ctx, r.GetImage().GetImage(), r.GetAuth())
	if err != nil {
		return nil, err
	}

	if _, err := x.images.RefreshImage(ctx, string(id)); err != nil {
		return nil, err
	}

	return &runtimeapi.PullImageResponse{ImageRef: string(id)}, nil
}

// findImage returns an image by name or ID. It reads an image missing from the view from the
// engine, in case it was built a moment ago. NotFound if it does not exist.
func findImage(ctx context.Context, view ImageView, ref string) (*model.Image, error) {
	i, err := view.Image(ref)
	if !errdefs.IsNotFound(err) {
		return i, err
	}
	return view.RefreshImage(ctx, ref)
}

// ListImages lists all images, or those selected by the filter: ID, name, repository or pattern
// (CRI ListImages).
func (x *imageService) ListImages(
	ctx context.Context, r *runtimeapi.ListImagesRequest,
) (*runtimeapi.ListImagesResponse, error) {
	resp, err := x.listImages(ctx, r)
	if err != nil {
		return nil, err
	}
	fitImages(resp.Images, maxList)
	return resp, nil
}

// listImages is ListImages without the size limit.
func (x *imageService) listImages(
	ctx context.Context, r *runtimeapi.ListImagesRequest,
) (*runtimeapi.ListImagesResponse, error) {
	if _, err := x.host(); err != nil {
		return nil, err
	}

	ref := r.GetFilter().GetImage().GetImage()
	filter, err := model.ParseImageFilter(ref)
	if err != nil {
		return nil, err
	}

	resp, err := x.matchingImages(filter)
	if err != nil || len(resp.Images) > 0 || ref == "" || filter.IsPattern() {
		return resp, err
	}

	// This adds an image to the view that was built a moment ago.
	if _, err := findImage(ctx, x.images, ref); err != nil {
		return resp, ignoreNotFound(err)
	}

	return x.matchingImages(filter)
}

func (x *imageService) matchingImages(filter model.ImageFilter) (*runtimeapi.ListImagesResponse, error) {
	images, err := x.images.Images()
	if err != nil {
		return nil, err
	}

	resp := &runtimeapi.ListImagesResponse{}
	for _, i := range images {
		if filter.Match(i) {
			resp.Images = append(resp.Images, i.CRI(x.store.IsPinned(i)))
		}
	}

	return resp, nil
}

// ImageStatus describes an image (CRI ImageStatus). For an unknown image, the response is empty.
func (x *imageService) ImageStatus(
	ctx context.Context, r *runtimeapi.ImageStatusRequest,
) (*runtimeapi.ImageStatusResponse, error) {
	if _, err := x.host(); err != nil {
		return nil, err
	}

	i, err := findImage(ctx, x.images, r.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	} else if err != nil {
		return nil, err
	}

	resp := &runtimeapi.ImageStatusResponse{Image: i.CRI(x.store.IsPinned(i))}
	if r.GetVerbose() {
		resp.Info, err = verboseInfo(map[string]any{"labels": i.Labels, "user": i.User})
	}

	return resp, err
}

// RemoveImage removes an image by ID, tag or digest, with all its names (CRI RemoveImage). It
// succeeds for an unknown image. FailedPrecondition if a container uses the image, and no name is
// removed. Pinned images are removed too: a pin is only a recommendation.
func (x *imageService) RemoveImage(
	ctx context.Context, r *runtimeapi.RemoveImageRequest,
) (*runtimeapi.RemoveImageResponse, error) {
	if _, err := x.host(); err != nil {
		return nil, err
	}

	i, err := findImage(ctx, x.images, r.GetImage().GetImage())
	if err == nil {
		err = x.removeImage(ctx, i.ID)
	}

	if err = ignoreNotFound(err); err != nil {
		return nil, fmt.Errorf("remove image %s: %w", r.GetImage().GetImage(), err)
	}

	return &runtimeapi.RemoveImageResponse{}, nil
}

func (x *imageService) removeImage(ctx context.Context, id model.ImageID) error {
	unlock, err := x.names.Lock(ctx, string(id))
	if err != nil {
		return err
	}
	defer unlock()

	i, err := x.images.Image(string(id))
	if err != nil {
		return err // removed by another call
	}

	// The engine would remove all names but the last before it finds the container.
	if users, err := x.store.ImageUsers(ctx, id); err != nil {
		return err
	} else if len(users) > 0 {
		return fmt.Errorf("in use by container %s: %w", strings.Join(users, ", "), errdefs.ErrFailedPrecondition)
	}

	if x.volumes.isUsed(id) {
		return fmt.Errorf("mounted into a container: %w", errdefs.ErrFailedPrecondition)
	}

	// The engine refuses to remove an image with names in several repositories by its ID without
	// force. Remove its names one by one; the last removes the image.
	for _, ref := range slices.Concat(i.RepoTags, i.RepoDigests, []string{string(i.ID)}) {
		if err := ignoreNotFound(x.store.RemoveImage(ctx, ref)); err != nil {
			_, refreshErr := x.images.RefreshImage(ctx, string(id)) // some names may be removed already
			return errors.Join(err, ignoreNotFound(refreshErr))
		}
	}

	x.images.ForgetImage(id)

	return nil
}

// ImageFsInfo reports the disk usage of images and of the writable layers of containers (CRI
// ImageFsInfo).
func (x *imageService) ImageFsInfo(
	_ context.Context, r *runtimeapi.ImageFsInfoRequest,
) (*runtimeapi.ImageFsInfoResponse, error) {
	if _, err := x.host(); err != nil {
		return nil, err
	}
	return x.stats.ImageFileSystem()
}
