package view

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// allImages is the only element of View.pendingImages.
const allImages = "all"

const (
	// imagesTimeout bounds the list of images in a full read: the view becomes ready without it.
	imagesTimeout = 5 * time.Second
	// imagesRetryTimeout bounds later lists.
	imagesRetryTimeout = 15 * time.Second
)

// imageStore holds the records of images. A list replaces all of them, except for images read one
// by one after the start of the list.
type imageStore struct {
	all     []*model.Image // shared with readers, never changed in place
	listed  uint64         // ticket of the last list; 0: none yet
	changes map[model.ImageID]imageChange
}

// imageChange is the result of a read of one image after the start of the last list.
type imageChange struct {
	image  *model.Image // nil: it was removed
	ticket uint64
}

func newImageStore() imageStore { return imageStore{changes: map[model.ImageID]imageChange{}} }

// replace takes the result of a list, unless a later list is known.
func (s *imageStore) replace(list []*model.Image, ticket uint64) {
	if ticket <= s.listed {
		return
	}

	s.all, s.listed = list, ticket
	maps.DeleteFunc(s.changes, func(_ model.ImageID, c imageChange) bool { return c.ticket < ticket })
	for id, c := range s.changes {
		s.apply(id, c.image)
	}
}

// put takes the result of a read of one image. nil means a removed image.
func (s *imageStore) put(id model.ImageID, image *model.Image, ticket uint64) {
	if ticket < s.listed || ticket < s.changes[id].ticket {
		return
	}
	s.changes[id] = imageChange{image: image, ticket: ticket}
	s.apply(id, image)
}

// apply changes the list. A name belongs to one image: a pull moves it to the new image.
func (s *imageStore) apply(id model.ImageID, image *model.Image) {
	next := make([]*model.Image, 0, len(s.all)+1)
	for _, i := range s.all {
		switch {
		case i.ID == id:
		case image != nil && slices.ContainsFunc(i.RepoTags, image.HasName):
			without := *i
			without.RepoTags = slices.DeleteFunc(slices.Clone(i.RepoTags), image.HasName)
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

// RefreshImages reads all images again.
func (v *View) RefreshImages(ctx context.Context) error {
	seen := v.metrics.beginRead("")
	ticket := v.beginInspection()
	images, err := v.src.Images(ctx)
	if err != nil {
		return err
	}

	v.mu.Lock()
	defer v.mu.Unlock()

	v.images.replace(images, ticket)
	if slices.ContainsFunc(images, func(i *model.Image) bool { return i.Stale }) {
		v.imagesRetry = nextRetry(v.imagesRetry)
		v.pendingImages.add(allImages, v.imagesRetry)
	} else {
		v.imagesRetry = 0
	}

	seen()

	return nil
}

// RefreshImage reads one image again, by its name or ID, and returns it. It returns NotFound if the
// engine does not have the image, and forgets the image with that ID. It does not wait for a
// hanging list of images.
func (v *View) RefreshImage(ctx context.Context, ref string) (*model.Image, error) {
	ticket := v.beginInspection()
	image, err := v.src.Image(ctx, ref)

	v.mu.Lock()
	defer v.mu.Unlock()

	if err == nil {
		v.images.put(image.ID, image, ticket)
		return image, nil
	}

	if id, badID := model.ParseImageID(ref); badID == nil && errdefs.IsNotFound(err) {
		v.images.put(id, nil, ticket)
	}

	return nil, err
}

// ForgetImage drops an image just removed from the engine.
func (v *View) ForgetImage(id model.ImageID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.images.put(id, nil, v.store.beginInspection())
}

// readPendingImages lists the images after events of images.
func (v *View) readPendingImages(ctx context.Context) error {
	for {
		if _, err := v.pendingImages.next(ctx); err != nil {
			return err
		}
		err := v.listImages(ctx, imagesRetryTimeout)
		if err != nil && (ctx.Err() != nil || errdefs.IsUnavailable(err)) {
			return err
		}
	}
}

// readPendingRefs reads single images after events. A list of all images takes seconds on a busy
// node, and until its end a name could mean the image of before a build or a removed image.
func (v *View) readPendingRefs(ctx context.Context) error {
	for {
		ref, err := v.pendingRefs.next(ctx)
		if err != nil {
			return err
		}

		readCtx, cancel := context.WithTimeout(ctx, imagesTimeout)
		if _, err := v.RefreshImage(readCtx, ref); err != nil { // the list of all images has the result
			v.log.Debug("cannot read the image of an event", "image", ref, "err", err)
		}
		cancel()
	}
}

// listImages reads all images within a timeout. A failed list is retried later.
func (v *View) listImages(ctx context.Context, timeout time.Duration) error {
	listCtx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	err := v.RefreshImages(listCtx)
	if err == nil || errdefs.IsUnavailable(err) || ctx.Err() != nil {
		return err
	}

	v.mu.Lock()
	v.imagesRetry = nextRetry(v.imagesRetry)
	retry := v.imagesRetry
	v.mu.Unlock()
	v.log.Warn("cannot list images", "err", err, "retry", retry)
	v.pendingImages.add(allImages, retry)

	return nil
}

// Images returns all images. It returns Unavailable until the engine has listed them, since clients
// would trust an empty list.
func (v *View) Images() ([]*model.Image, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.images.listed == 0 {
		return nil, fmt.Errorf("list images: Docker has not listed them yet: %w", errdefs.ErrUnavailable)
	}
	return v.images.all, nil
}

// Image returns the image with this name, digest, ID, or prefix of an ID. It returns NotFound if
// there is none.
func (v *View) Image(ref string) (*model.Image, error) {
	v.mu.RLock()
	images := v.images.all
	v.mu.RUnlock()
	if name := model.FamiliarName(ref); name != "" {
		for _, i := range images {
			if i.HasName(name) {
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
