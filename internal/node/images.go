package node

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// imageStore holds the records of images. A list replaces all of them. What one call has found of one
// image outlives every list that began before it, so calls need no list of all.
type imageStore struct {
	all     []*spec.Image // shared with readers, never changed in place
	listed  uint64        // the inspection ticket of the list; 0: there was none yet
	changes map[model.ImageID]imageChange
}

// imageChange is what was found of one image after the last list had begun.
type imageChange struct {
	image  *spec.Image // nil: it was removed
	ticket uint64
}

func newImageStore() imageStore { return imageStore{changes: map[model.ImageID]imageChange{}} }

// replace takes a list that began with a ticket, unless a later one is known.
func (s *imageStore) replace(list []*spec.Image, ticket uint64) {
	if ticket <= s.listed {
		return
	}
	s.all, s.listed = list, ticket
	maps.DeleteFunc(s.changes, func(_ model.ImageID, c imageChange) bool { return c.ticket < ticket })
	for id, c := range s.changes {
		s.apply(id, c.image)
	}
}

// put takes what was found of one image by a request that began with a ticket; nil: it was removed.
func (s *imageStore) put(id model.ImageID, image *spec.Image, ticket uint64) {
	if ticket < s.listed || ticket < s.changes[id].ticket {
		return
	}
	s.changes[id] = imageChange{image: image, ticket: ticket}
	s.apply(id, image)
}

// apply changes the list. A name belongs to one image: a pull takes it from the image that had it.
func (s *imageStore) apply(id model.ImageID, image *spec.Image) {
	next := make([]*spec.Image, 0, len(s.all)+1)
	for _, i := range s.all {
		switch {
		case i.ID == id:
		case image != nil && slices.ContainsFunc(i.RepoTags, image.Named):
			without := *i
			without.RepoTags = slices.DeleteFunc(slices.Clone(i.RepoTags), image.Named)
			next = append(next, &without)
		default:
			next = append(next, i)
		}
	}
	if image != nil {
		next = append(next, image)
	}
	s.all = next
}

// RefreshImages reads all images anew.
func (v *View) RefreshImages(ctx context.Context) error {
	seen := v.metrics.looking("")
	ticket := v.look()
	images, err := v.src.Images(ctx)
	if err != nil {
		return err
	}

	v.mu.Lock()
	defer v.mu.Unlock()
	v.images.replace(images, ticket)
	if slices.ContainsFunc(images, func(i *spec.Image) bool { return i.Stale }) {
		v.imagesPause = nextRetry(v.imagesPause)
		v.dirtyImages.mark(allImages, v.imagesPause)
	} else {
		v.imagesPause = 0
	}
	seen()
	return nil
}

// RefreshImage reads one image anew, by its name or ID, and returns it. NotFound if the engine does not
// have it. It does not wait for a list of images that hangs.
func (v *View) RefreshImage(ctx context.Context, ref string) (*spec.Image, error) {
	ticket := v.look()
	image, err := v.src.Image(ctx, ref)
	if err != nil {
		return nil, err
	}

	v.mu.Lock()
	defer v.mu.Unlock()
	v.images.put(image.ID, image, ticket)
	return image, nil
}

// ForgetImage takes out an image that the engine has just removed.
func (v *View) ForgetImage(id model.ImageID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.images.put(id, nil, v.store.begin())
}

// renewImages reads the images when events have named one.
func (v *View) renewImages(ctx context.Context) error {
	for {
		if _, err := v.dirtyImages.next(ctx); err != nil {
			return err
		}
		err := v.listImages(ctx, imagesRetryTimeout)
		if err != nil && (ctx.Err() != nil || errdefs.IsUnavailable(err)) {
			return err
		}
	}
}

// listImages reads the images within a time. A list that fails or takes too long is tried again later.
func (v *View) listImages(ctx context.Context, timeout time.Duration) error {
	listCtx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := v.RefreshImages(listCtx)
	if err == nil || errdefs.IsUnavailable(err) || ctx.Err() != nil {
		return err
	}

	v.mu.Lock()
	v.imagesPause = nextRetry(v.imagesPause)
	pause := v.imagesPause
	v.mu.Unlock()
	v.log.Warn("the images cannot be listed now", "err", err, "retry", pause)
	v.dirtyImages.mark(allImages, pause)
	return nil
}

// Images returns all images. Unavailable while the engine has not listed them: an empty list would be
// taken for the truth.
func (v *View) Images() ([]*spec.Image, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.images.listed == 0 {
		return nil, fmt.Errorf("list images: Docker has not listed them yet: %w", errdefs.ErrUnavailable)
	}
	return v.images.all, nil
}

// Image returns the image with this name, digest, or ID, which may be shortened. NotFound if there is
// none.
func (v *View) Image(ref string) (*spec.Image, error) {
	v.mu.RLock()
	images := v.images.all
	v.mu.RUnlock()
	if name := spec.Familiar(ref); name != "" {
		for _, i := range images {
			if i.Named(name) {
				return i, nil
			}
		}
	}
	for _, i := range images {
		if i.HasID(ref) {
			return i, nil
		}
	}
	return nil, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
}
