package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PullImage pulls an image and returns the engine's ID of it, the same as Image.id and ContainerStatus.image_id (CRI PullImage).
func (s *Service) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	id, err := s.Engine.Pull(ctx, r.GetImage().GetImage(), r.GetAuth())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: id}, s.View.RefreshImages(ctx)
}

// ListImages lists images, all or the one that the filter names (CRI ListImages).
func (s *Service) ListImages(_ context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	resp := &runtimeapi.ListImagesResponse{}
	if ref := r.GetFilter().GetImage().GetImage(); ref != "" {
		if i, err := s.View.Image(ref); err == nil {
			resp.Images = append(resp.Images, i.CRI())
		}
		return resp, nil
	}
	for _, i := range s.View.Images() {
		resp.Images = append(resp.Images, i.CRI())
	}
	return resp, nil
}

// ImageStatus describes an image; one that is not there is an empty answer, no error (CRI ImageStatus).
func (s *Service) ImageStatus(_ context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	i, err := s.View.Image(r.GetImage().GetImage())
	if err != nil {
		return &runtimeapi.ImageStatusResponse{}, notFoundIsFine(err)
	}
	resp := &runtimeapi.ImageStatusResponse{Image: i.CRI()}
	if r.GetVerbose() {
		resp.Info, err = verbose(map[string]any{"labels": i.Labels, "user": i.User})
	}
	return resp, err
}

// RemoveImage removes an image with all its names, by ID, tag or digest (CRI RemoveImage). One that is not there is a success; the sandbox
// image is FailedPrecondition.
func (s *Service) RemoveImage(ctx context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	i, err := s.View.Image(r.GetImage().GetImage())
	if err != nil {
		return &runtimeapi.RemoveImageResponse{}, notFoundIsFine(err)
	}
	if i.Pinned {
		return nil, fmt.Errorf("remove image %s: it is pinned: %w", r.GetImage().GetImage(), errdefs.ErrFailedPrecondition)
	}
	// An image with names in several repositories cannot be removed by its ID without force; its names are removed one by one, and the
	// last takes the image with it.
	names := i.RepoTags
	if len(names) == 0 {
		names = i.RepoDigests
	}
	for _, ref := range append(append([]string{}, names...), i.ID) {
		if err := notFoundIsFine(s.Engine.RemoveImage(ctx, ref)); err != nil {
			return nil, err
		}
	}
	return &runtimeapi.RemoveImageResponse{}, s.View.RefreshImages(ctx)
}

// ImageFsInfo says how much images take (CRI ImageFsInfo): the sum of their sizes, from memory, in the file system of the engine's data.
// Layers that images share are counted for each; inodes are not known.
func (s *Service) ImageFsInfo(_ context.Context, r *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	host, err := s.begin(r)
	if err != nil {
		return nil, err
	}
	var used uint64
	for _, i := range s.View.Images() {
		used += uint64(max(i.Size, 0))
	}
	usage := func(bytes uint64) []*runtimeapi.FilesystemUsage {
		return []*runtimeapi.FilesystemUsage{{
			Timestamp: time.Now().UnixNano(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: host.RootDir},
			UsedBytes: &runtimeapi.UInt64Value{Value: bytes}, InodesUsed: &runtimeapi.UInt64Value{},
		}}
	}
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: usage(used), ContainerFilesystems: usage(used)}, nil
}
