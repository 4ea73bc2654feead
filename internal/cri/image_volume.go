package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/undo"
)

// preparing counts the containers that are being made with an image volume, by image ID: the view does not know them yet.
type preparing struct {
	mu sync.Mutex // guards n
	n  map[model.ImageID]int
}

func (p *preparing) add(imageID model.ImageID, d int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n == nil {
		p.n = map[model.ImageID]int{}
	}
	if p.n[imageID] += d; p.n[imageID] == 0 {
		delete(p.n, imageID)
	}
}

func (p *preparing) has(imageID model.ImageID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.n[imageID] > 0
}

// imageVolumes makes the images that a container mounts ready, by their index among its mounts. Where the engine does not mount images
// itself, we do; containers share a mount, and u undoes this container's part in it. made is to be called when the view knows the
// container, or when it was not made after all.
func (s *Service) imageVolumes(ctx context.Context, cfg *runtimeapi.ContainerConfig, host spec.Host, u *undo.Stack) (volumes map[int]spec.ImageVolume, made func(), err error) {
	var ids []model.ImageID
	made = func() {
		for _, id := range ids {
			s.preparing.add(id, -1)
		}
		ids = nil
	}
	volumes = map[int]spec.ImageVolume{}
	for i, m := range cfg.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}
		field := fmt.Sprintf("config.mounts[%d].image", i)
		if err := host.CheckImageVolumes(); err != nil {
			return nil, made, fmt.Errorf("%s: %w", field, err)
		}
		image, err := s.image(ctx, m.GetImage().GetImage())
		if err != nil {
			return nil, made, fmt.Errorf("%s: %w", field, err)
		}
		v := spec.NewImageVolume(m, image)
		if !host.NativeImageVolumes() {
			s.preparing.add(v.ImageID, 1)
			ids = append(ids, v.ImageID)
			u.Push("mount of image "+string(v.ImageID), func(ctx context.Context) error {
				made()
				return s.releaseImageVolume(ctx, v.ImageID)
			})
			if v.Path, err = s.mountImage(ctx, v); err != nil {
				return nil, made, fmt.Errorf("%s: %w", field, err)
			}
		}
		volumes[i] = v
	}
	return volumes, made, nil
}

func volumeLock(imageID model.ImageID) string { return "image volume " + string(imageID) }

func (s *Service) mountImage(ctx context.Context, v spec.ImageVolume) (string, error) {
	unlock, err := s.names.Lock(ctx, volumeLock(v.ImageID))
	if err != nil {
		return "", err
	}
	defer unlock()
	layers, err := s.Engine.HoldImage(ctx, v.ImageID) // also if it is mounted: a prune may have taken the holder
	if err != nil {
		return "", err
	}
	if err := s.Volumes.Mount(v.ImageID, layers); err != nil {
		return "", err
	}
	return s.Volumes.Resolve(v.ImageID, v.SubPath)
}

// usesImageVolume says whether a container, running or not, mounts the image.
func (s *Service) usesImageVolume(imageID model.ImageID) bool {
	return slices.ContainsFunc(s.View.Containers(), func(c *spec.Container) bool { return c.MountsImage(imageID) })
}

// releaseImageVolume undoes the mount of an image unless somebody uses it.
func (s *Service) releaseImageVolume(ctx context.Context, imageID model.ImageID) error {
	unlock, err := s.names.Lock(ctx, volumeLock(imageID))
	if err != nil {
		return err
	}
	defer unlock()
	if s.preparing.has(imageID) || s.usesImageVolume(imageID) {
		return nil
	}
	if err := s.Volumes.Unmount(imageID); err != nil {
		return err
	}
	return s.Engine.ReleaseImage(ctx, imageID)
}

// collectImageVolumes undoes mounts of images that nobody uses any more: those that are there, and of also.
func (s *Service) collectImageVolumes(ctx context.Context, also ...model.ImageID) error {
	ids, err := s.Volumes.List()
	ids = append(ids, also...)
	slices.Sort(ids)
	errs := []error{err}
	for _, id := range slices.Compact(ids) {
		errs = append(errs, s.releaseImageVolume(ctx, id))
	}
	return errors.Join(errs...)
}

// recoverImageVolumes clears mounts and holders without a user, and makes holders anew that somebody has pruned.
func (s *Service) recoverImageVolumes(ctx context.Context, host spec.Host) error {
	if host.NativeImageVolumes() || host.CheckImageVolumes() != nil {
		return nil
	}
	held, err := s.Engine.HeldImages(ctx)
	if err != nil {
		return err
	}
	errs := []error{s.collectImageVolumes(ctx, held...)}
	mounted, err := s.Volumes.List()
	errs = append(errs, err)
	for _, id := range mounted {
		if !slices.Contains(held, id) && s.usesImageVolume(id) {
			_, err := s.Engine.HoldImage(ctx, id)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
