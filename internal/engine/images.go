package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/engine/tolerant"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/secret"
	"cri-dockerd/internal/text"
	"cri-dockerd/internal/translate"
)

// allKeys is the only key of a lock in a keylock.Map used as a mutex. These locks are held during
// requests to the engine, so waiting for them must honour ctx.
const allKeys = ""

// maxImageInspects is the maximum number of concurrent image inspects of Images.
const maxImageInspects = 4

// Images lists all images except unnamed parents of other images (GET /images/json). It inspects
// new and changed images. An image without a timely inspect response is marked as stale.
func (e *Engine) Images(ctx context.Context) ([]*model.Image, error) {
	unlock, err := e.images.listing.Lock(ctx, allKeys)
	if err != nil {
		return nil, fmt.Errorf("list images: wait for a list in progress: %w", err)
	}
	defer unlock()

	old, stale := e.images.snapshot()
	list, err := e.listImages(ctx)
	if err != nil {
		return nil, wrap(err, "list images")
	}

	read := make([]cachedImage, len(list))
	g, groupCtx := errgroup.WithContext(ctx)
	g.SetLimit(maxImageInspects)
	late := newStragglers(groupCtx, e.Ping)
	defer late.stop()

	for i, s := range list {
		id := model.ImageID(s.ID) // checked by listImages
		if c := old[id]; c.isCurrent(s) && stale[id] == 0 {
			read[i] = c
			continue
		}

		g.Go(func() (err error) {
			read[i], err = e.describe(groupCtx, s, old[id].image, late)
			return err
		})
	}

	if err := g.Wait(); err != nil {
		return nil, err
	}

	known := make(map[model.ImageID]cachedImage, len(list))
	out := make([]*model.Image, 0, len(list))
	for _, c := range read {
		if c.image != nil {
			known[c.image.ID] = c
			out = append(out, c.image)
		}
	}

	e.images.replace(known, stale)

	return out, nil
}

// isCurrent reports whether the cached inspect is still valid, because the image's entry in the
// list has not changed.
func (c cachedImage) isCurrent(s image.Summary) bool {
	return c.image != nil && !c.image.Stale && slices.Equal(c.summary, summaryOf(s))
}

// describe inspects an image of the list. It returns a zero cachedImage for a removed image and for
// an image that Docker cannot inspect. If the engine does not respond in time, describe combines
// the data of the list with the last known state.
func (e *Engine) describe(
	ctx context.Context, s image.Summary, before *model.Image, late *stragglers,
) (cachedImage, error) {
	inspectCtx, done := late.begin(ctx)
	defer done()

	in, err := e.inspectImage(inspectCtx, s.ID)
	hangs := inspectCtx.Err() != nil
	err = wrap(err, "inspect image %s", s.ID)
	switch {
	case errdefs.IsNotFound(err):
		return cachedImage{}, nil
	case err != nil && isUnanswered(ctx, err):
		return cachedImage{}, err
	case err != nil && !hangs: // "layer does not exist" during a removal
		e.cfg.Log.Debug("failed to inspect image; omitting it from the image list", "err", err)
		return cachedImage{}, nil
	}

	read, readErr := translate.ReadImage(s, in)
	if readErr != nil {
		e.cfg.Log.Warn("failed to read image; omitting it from the image list", "err", readErr)
		return cachedImage{}, nil
	}

	if err != nil {
		level := slog.LevelWarn
		if before != nil && before.Stale { // each list repeats it on a slow engine
			level = slog.LevelDebug
		}
		e.cfg.Log.Log(ctx, level, "failed to inspect image in time; using the engine's image list instead", "err", err)
		read = read.StaleAfter(before)
	}

	return cachedImage{summary: summaryOf(s), image: read}, nil
}

// Image inspects one image by name or ID (GET /images/{name}/json). An unknown image is NotFound.
// The next list inspects the image again.
func (e *Engine) Image(ctx context.Context, ref string) (*model.Image, error) {
	in, err := e.inspectImage(ctx, ref)
	if err != nil {
		return nil, wrap(err, "inspect image %s", ref)
	}

	i, err := translate.ReadImage(image.Summary{ID: in.ID, Size: in.Size}, in)
	if err != nil {
		return nil, wrap(err, "inspect image %s", ref)
	}

	e.images.put(i)

	return i, nil
}

// imageLabels returns the labels inherited by the containers of an image. They are unknown for a
// removed image.
func (e *Engine) imageLabels(ctx context.Context, id string) (model.ImageLabels, error) {
	if i := e.images.get(id); i != nil {
		return i.InheritedLabels(), nil
	}

	in, err := e.inspectImage(ctx, id)
	if errdefs.IsNotFound(err) || id == "" {
		return model.ImageLabels{Unknown: true}, nil
	} else if err != nil {
		return model.ImageLabels{}, wrap(err, "inspect image %s", id)
	}

	i, err := translate.ReadImage(image.Summary{ID: in.ID}, in)
	if err != nil {
		return model.ImageLabels{}, wrap(err, "inspect image %s", id)
	}

	return i.InheritedLabels(), nil
}

// IsPinned reports whether the kubelet must not remove an image: the sandbox image, identified by
// the engine's ID of it, or an image pinned by the operator. An image cannot pin itself.
func (e *Engine) IsPinned(i *model.Image) bool {
	if id := e.pauseID.Load(); id != nil && i.ID == *id {
		return true
	}
	return e.cfg.PauseImage != "" && i.Is(e.cfg.PauseImage) || e.cfg.Pins.Match(i)
}

// ImageUsers returns the names of the containers of an image, running or not (GET
// /containers/json).
func (e *Engine) ImageUsers(ctx context.Context, id model.ImageID) ([]string, error) {
	list, err := e.list(ctx, make(client.Filters).Add("ancestor", string(id)))
	if errdefs.IsNotFound(err) { // older engines, for an unknown image
		return nil, nil
	} else if err != nil {
		return nil, wrap(err, "list the containers of image %s", id)
	}

	var names []string
	for _, c := range list {
		if c.ImageID != string(id) { // a container of an image built on this one
			continue
		}
		names = append(names, cmp.Or(c.name(), c.ID))
	}

	return names, nil
}

// RemoveImage removes one name of an image or, with an ID, the whole image (DELETE /images/{name}).
// An unknown image is NotFound, and an image used by a container is a Conflict.
func (e *Engine) RemoveImage(ctx context.Context, ref string) error {
	_, err := e.docker().ImageRemove(ctx, ref, client.ImageRemoveOptions{PruneChildren: true})
	if id, idErr := model.ParseImageID(ref); idErr == nil && (err == nil || errdefs.IsNotFound(err)) {
		e.images.remove(id)
	}
	return wrap(err, "remove image %s", ref)
}

// LoadImage loads an archive of images (POST /images/load).
func (e *Engine) LoadImage(ctx context.Context, archive io.Reader) error {
	r, err := e.docker().ImageLoad(ctx, archive, client.ImageLoadWithQuiet(true))
	if err != nil {
		return wrap(err, "load image")
	}
	defer r.Close()
	return wrap(streamError(r), "load image")
}

// streamError reads a stream of progress messages to its end. The engine reports failures in a
// message, after status 200.
func streamError(r io.Reader) error {
	type message struct {
		Error string `json:"error"`
	}

	return tolerant.Sequence(r, messageLimits, func(m *message) error {
		if m.Error != "" {
			return errors.New(text.Clean(m.Error, text.MaxMessage))
		}
		return nil
	})
}

// ResolveImage checks whether a registry has an image, by requesting its manifest with this
// machine's credentials (GET /distribution/{name}/json). It does not pull the image. Errors come
// from the registry or from ctx.
func (e *Engine) ResolveImage(ctx context.Context, ref string) error {
	auth, authErr := machineAuth(e.cfg.AuthDir, ref)
	_, err := e.docker().DistributionInspect(ctx, ref, client.DistributionInspectOptions{EncodedRegistryAuth: auth})
	if err != nil {
		return errors.Join(wrap(secret.Hide(err, secrets(auth)...), "resolve image %s", ref), authErr)
	}
	return nil
}
