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

// imageVolumes are the images that are mounted into containers where the engine cannot do so
// itself.
type imageVolumes struct {
	*gate
	images    ImageView
	store     Images
	mounts    Volumes
	preparing preparing
}

// preparing counts the containers that are being made with an image volume, by image ID: the view
// does not know them yet.
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

// prepare makes the images that a container mounts ready, by their index among its mounts. Where
// the engine does not mount images itself, we do; containers share a mount, and u undoes this
// container's part in it. made is to be called when the view knows the container, or when it was
// not made after all.
func (v *imageVolumes) prepare(
	ctx context.Context,
	cfg *runtimeapi.ContainerConfig,
	host spec.Host,
	u *undo.Stack,
) (volumes map[int]spec.ImageVolume, made func(), err error) {
	var ids []model.ImageID
	made = func() {
		for _, id := range ids {
			v.preparing.add(id, -1)
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

		image, err := findImage(ctx, v.images, m.GetImage().GetImage())
		if err != nil {
			return nil, made, fmt.Errorf("%s: %w", field, err)
		}

		one := spec.NewImageVolume(m, image)
		if !host.NativeImageVolumes() {
			v.preparing.add(one.ImageID, 1)
			ids = append(ids, one.ImageID)
			u.Push("mount of image "+string(one.ImageID), func(ctx context.Context) error {
				made()
				return v.release(ctx, one.ImageID)
			})

			if one.Path, err = v.mount(ctx, one); err != nil {
				return nil, made, fmt.Errorf("%s: %w", field, err)
			}
		}

		volumes[i] = one
	}

	return volumes, made, nil
}

func volumeLock(imageID model.ImageID) string { return "image volume " + string(imageID) }

func (v *imageVolumes) mount(ctx context.Context, one spec.ImageVolume) (string, error) {
	unlock, err := v.names.Lock(ctx, volumeLock(one.ImageID))
	if err != nil {
		return "", err
	}
	defer unlock()

	layers, err := v.store.HoldImage(ctx, one.ImageID) // also if it is mounted: a prune may have taken the holder
	if err != nil {
		return "", err
	}

	if err := v.mounts.Mount(one.ImageID, layers); err != nil {
		return "", err
	}

	return v.mounts.Resolve(one.ImageID, one.SubPath)
}

// isUsed says whether a container, running or not, mounts the image.
func (v *imageVolumes) isUsed(imageID model.ImageID) bool {
	return slices.ContainsFunc(v.view.Containers(), func(c *spec.Container) bool { return c.MountsImage(imageID) })
}

// release undoes the mount of an image unless somebody uses it.
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

// collect undoes mounts of images that nobody uses any more: those that are there, and of also.
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

// restore clears mounts and holders without a user, and makes holders anew that somebody has
// pruned.
func (v *imageVolumes) restore(ctx context.Context, host spec.Host) error {
	if host.NativeImageVolumes() || host.CheckImageVolumes() != nil {
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
