package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
	"cri-dockerd/internal/undo"
	"cri-dockerd/internal/validate"
)

// imageVolumes manages images mounted into containers, for engines that cannot mount images
// themselves.
type imageVolumes struct {
	*gate
	images    ImageView
	store     Images
	mounts    Volumes
	preparing preparing
}

// preparing counts, by image ID, the containers being created with an image volume. The view does
// not have them yet.
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

// prepare provides the images mounted by a container, keyed by the index of the mount. If the
// engine does not support image volumes, prepare mounts the image itself. Containers share a mount,
// and u undoes this container's use of it. Call done once the view has the container, or if it was
// not created.
func (v *imageVolumes) prepare(
	ctx context.Context, cfg *runtimeapi.ContainerConfig, host model.Host, u *undo.Stack,
) (volumes map[int]model.ImageVolume, done func(), err error) {
	var ids []model.ImageID
	done = func() {
		for _, id := range ids {
			v.preparing.add(id, -1)
		}
		ids = nil
	}

	volumes = map[int]model.ImageVolume{}
	for i, m := range cfg.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}

		field := fmt.Sprintf("config.mounts[%d].image", i)
		if err := validate.ImageVolumes(host); err != nil {
			return nil, done, fmt.Errorf("%s: %w", field, err)
		}

		image, err := findImage(ctx, v.images, m.GetImage().GetImage())
		if err != nil {
			return nil, done, fmt.Errorf("%s: %w", field, err)
		}

		volume := translate.NewImageVolume(m, image)
		if !host.NativeImageVolumes() {
			v.preparing.add(volume.ImageID, 1)
			ids = append(ids, volume.ImageID)
			u.Push("mount of image "+string(volume.ImageID), func(ctx context.Context) error {
				done()
				return v.release(ctx, volume.ImageID)
			})

			if volume.Path, err = v.mount(ctx, volume); err != nil {
				return nil, done, fmt.Errorf("%s: %w", field, err)
			}
		}

		volumes[i] = volume
	}

	return volumes, done, nil
}

func volumeLock(imageID model.ImageID) string { return "image volume " + string(imageID) }

func (v *imageVolumes) mount(ctx context.Context, volume model.ImageVolume) (string, error) {
	unlock, err := v.names.Lock(ctx, volumeLock(volume.ImageID))
	if err != nil {
		return "", err
	}
	defer unlock()

	// Also if it is mounted: a prune may have removed the holder.
	layers, err := v.store.HoldImage(ctx, volume.ImageID)
	if err != nil {
		return "", err
	}

	if err := v.mounts.Mount(volume.ImageID, layers); err != nil {
		return "", err
	}

	return v.mounts.Resolve(volume.ImageID, volume.SubPath)
}

// isUsed reports whether a container, running or not, mounts the image.
func (v *imageVolumes) isUsed(imageID model.ImageID) bool {
	return slices.ContainsFunc(v.view.Containers(), func(c *model.Container) bool { return c.MountsImage(imageID) })
}

// release unmounts an image unless it is in use.
func (v *imageVolumes) release(ctx context.Context, imageID model.ImageID) error {
	unlock, err := v.names.Lock(ctx, volumeLock(imageID))
	if err != nil {
		return err
	}
	defer unlock()

	if v.preparing.has(imageID) || v.isUsed(imageID) {
		return nil
	}
	if err := v.mounts.Unmount(imageID); err != nil {
		return err
	}

	return v.store.ReleaseImage(ctx, imageID)
}

// collect unmounts all unused images: all mounted ones, and those in also.
func (v *imageVolumes) collect(ctx context.Context, also ...model.ImageID) error {
	ids, err := v.mounts.List()
	ids = append(ids, also...)
	slices.Sort(ids)
	errs := []error{err}
	for _, id := range slices.Compact(ids) {
		errs = append(errs, v.release(ctx, id))
	}

	return errors.Join(errs...)
}

// restore removes unused mounts and holders, and creates pruned holders again.
func (v *imageVolumes) restore(ctx context.Context, host model.Host) error {
	if host.NativeImageVolumes() || validate.ImageVolumes(host) != nil {
		return nil
	}

	held, err := v.store.HeldImages(ctx)
	if err != nil {
		return err
	}

	errs := []error{v.collect(ctx, held...)}
	mounted, err := v.mounts.List()
	errs = append(errs, err)
	for _, id := range mounted {
		if !slices.Contains(held, id) && v.isUsed(id) {
			_, err := v.store.HoldImage(ctx, id)
			errs = append(errs, err)
		}
	}

	return errors.Join(errs...)
}
