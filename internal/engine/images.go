package engine

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/internal/engine/tolerant"
	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/secret"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/text"
)

// allKeys is the key of locks that are one only. They are held while the engine works, so their
// waits honour ctx.
const allKeys = ""

// imageCache remembers what only an image's inspect says, as long as the list says the same of it.
type imageCache struct {
	listing keylock.Map // one look at a time, so that an older one never follows a newer one

	mu   sync.Mutex                    // guards the rest, for moments only: pods start meanwhile
	byID map[model.ImageID]cachedImage // of the last list, never changed
	// images to be inspected anew, with the number of times that this was asked
	stale map[model.ImageID]int
}

func newImageCache() imageCache {
	return imageCache{
		byID:  map[model.ImageID]cachedImage{},
		stale: map[model.ImageID]int{},
	}
}

type cachedImage struct {
	listed []string // the names and the size in the list
	image  *spec.Image
}

// listed is what the list says of an image and may change.
func listed(s image.Summary) []string {
	names := append(append([]string{strconv.FormatInt(s.Size, 10)}, s.RepoTags...), s.RepoDigests...)
	slices.Sort(names)
	return names
}

// forget has the next list inspect an image anew.
func (c *imageCache) forget(id model.ImageID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stale[id]++
}

// put adds an image that was inspected without a list. The next list inspects it anew.
func (c *imageCache) put(i *spec.Image) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stale[i.ID]++
	c.byID = maps.Clone(c.byID)
	c.byID[i.ID] = cachedImage{image: i}
}

// remove takes out an image that was removed.
func (c *imageCache) remove(id model.ImageID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byID = maps.Clone(c.byID)
	delete(c.byID, id)
}

// last is what the last look saw, and what is stale of it.
func (c *imageCache) last() (byID map[model.ImageID]cachedImage, stale map[model.ImageID]int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID, maps.Clone(c.stale)
}

// seen is what a look has seen, which inspected what was stale when it began.
func (c *imageCache) seen(byID map[model.ImageID]cachedImage, stale map[model.ImageID]int) {
	c.mu.Lock()
	defer c.mu.Unlock()

	c.byID = byID
	for id, n := range stale {
		if c.stale[id] == n {
			delete(c.stale, id)
		}
	}
}

// get is the image of this ID in the last list, nil if it was not there.
func (c *imageCache) get(id string) *spec.Image {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID[model.ImageID(id)].image
}

// has says whether the last list had an image of this name or ID.
func (c *imageCache) has(ref string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()

	for _, i := range c.byID {
		if i.image.Is(ref) {
			return true
		}
	}

	return false
}

// imageInspects is how many images are inspected at once while all are listed.
const imageInspects = 4

// Images reads all images that have a name or are nobody's layer (GET /images/json), and inspects
// those that are new or have changed. One that the engine does not describe in time is marked as
// stale.
func (e *Engine) Images(ctx context.Context) ([]*spec.Image, error) {
	unlock, err := e.images.listing.Lock(ctx, allKeys)
	if err != nil {
		return nil, fmt.Errorf("list images: wait for the list before: %w", err)
	}
	defer unlock()

	old, stale := e.images.last()
	list, err := e.listImages(ctx)
	if err != nil {
		return nil, wrap(err, "list images")
	}

	read := make([]cachedImage, len(list))
	g, groupCtx := errgroup.WithContext(ctx)
	g.SetLimit(imageInspects)
	late := newStragglers(groupCtx, e.Ping)
	defer late.stop()

	for i, s := range list {
		id := model.ImageID(s.ID) // listImages has checked it
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
	out := make([]*spec.Image, 0, len(list))
	for _, c := range read {
		if c.image != nil {
			known[c.image.ID] = c
			out = append(out, c.image)
		}
	}

	e.images.seen(known, stale)

	return out, nil
}

// isCurrent says whether an inspect would show nothing new: the list says the same as before.
func (c cachedImage) isCurrent(s image.Summary) bool {
	return c.image != nil && !c.image.Stale && slices.Equal(c.listed, listed(s))
}

// describe inspects an image of the list. One that is gone, or that Docker cannot describe, is left
// out; one that it does not describe in time is what the list says and what was known before, if
// anything was.
func (e *Engine) describe(
	ctx context.Context, s image.Summary, before *spec.Image, late *stragglers,
) (cachedImage, error) {
	inspectCtx, done := late.begin(ctx)
	defer done()

	in, err := e.inspectImage(inspectCtx, s.ID)
	hangs := inspectCtx.Err() != nil
	err = wrap(err, "inspect image %s", s.ID)
	switch {
	case errdefs.IsNotFound(err):
		return cachedImage{}, nil
	case err != nil && unanswered(ctx, err):
		return cachedImage{}, err
	case err != nil && !hangs: // "layer does not exist", while it is being removed
		e.cfg.Log.Debug("an image that Docker cannot describe is left out", "err", err)
		return cachedImage{}, nil
	}

	read, readErr := spec.ReadImage(s, in)
	if readErr != nil {
		e.cfg.Log.Warn("an image is left out of the list", "err", readErr)
		return cachedImage{}, nil
	}

	if err != nil {
		e.cfg.Log.Warn("an image that Docker does not describe in time is shown as the list has it", "err", err)
		read = read.StaleAfter(before)
	}

	read.Pinned = e.isPinned(read)

	return cachedImage{listed: listed(s), image: read}, nil
}

// Image reads one image by its name or ID (GET /images/{name}/json); NotFound if there is none. The
// next list reads it anew.
func (e *Engine) Image(ctx context.Context, ref string) (*spec.Image, error) {
	in, err := e.inspectImage(ctx, ref)
	if err != nil {
		return nil, wrap(err, "inspect image %s", ref)
	}

	i, err := spec.ReadImage(image.Summary{ID: in.ID, Size: in.Size}, in)
	if err != nil {
		return nil, wrap(err, "inspect image %s", ref)
	}

	i.Pinned = e.isPinned(i)
	e.images.put(i)

	return i, nil
}

// imageLabels are the labels that an image brings into its containers. An image that was removed is
// unknown.
func (e *Engine) imageLabels(ctx context.Context, id string) (spec.ImageLabels, error) {
	if i := e.images.get(id); i != nil {
		return i.Brings(), nil
	}

	in, err := e.inspectImage(ctx, id)
	if errdefs.IsNotFound(err) || id == "" {
		return spec.ImageLabels{Unknown: true}, nil
	} else if err != nil {
		return spec.ImageLabels{}, wrap(err, "inspect image %s", id)
	}

	i, err := spec.ReadImage(image.Summary{ID: in.ID}, in)
	if err != nil {
		return spec.ImageLabels{}, wrap(err, "inspect image %s", id)
	}

	return i.Brings(), nil
}

// isPinned says whether the kubelet must keep an image: the sandbox image, by the ID that the
// engine gives it, or one that the operator has named. An image cannot pin itself.
func (e *Engine) isPinned(i *spec.Image) bool {
	if id := e.pauseID.Load(); id != nil && i.ID == *id {
		return true
	}
	return e.cfg.PauseImage != "" && i.Is(e.cfg.PauseImage) || e.cfg.Pins.Match(i)
}

// ImageUsers are the names of the containers, running or not, that were made from an image (GET
// /containers/json).
func (e *Engine) ImageUsers(ctx context.Context, id model.ImageID) ([]string, error) {
	list, err := e.list(ctx, make(client.Filters).Add("ancestor", string(id)))
	if errdefs.IsNotFound(err) { // older engines: no such image
		return nil, nil
	} else if err != nil {
		return nil, wrap(err, "list the containers of image %s", id)
	}

	var names []string
	for _, c := range list {
		if c.ImageID != string(id) { // made from an image that was built upon this one
			continue
		}
		names = append(names, cmp.Or(c.name(), c.ID))
	}

	return names, nil
}

// RemoveImage removes one name of an image, or with an ID all of it (DELETE /images/{name}).
// NotFound if it is not there, Conflict while a container uses it.
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

// streamError reads a stream of progress messages to its end; the engine reports what went wrong in
// a message, after status 200.
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

// PauseImage makes sure that the sandbox image is there: the embedded one, loaded if missing, or
// the configured one, pulled if missing, with the credentials of this machine.
func (e *Engine) PauseImage(ctx context.Context) (spec.PauseImage, error) {
	ref := e.cfg.PauseImage
	if ref == "" {
		return e.embeddedPause(ctx)
	}
	if e.images.has(ref) {
		return spec.PauseImage{Source: ref, Name: ref}, nil
	}

	if _, err := e.inspectImage(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
		return spec.PauseImage{}, wrap(err, "inspect pause image %s", ref)
	} else if err != nil {
		if err := e.pullPause(ctx, ref); err != nil {
			return spec.PauseImage{}, fmt.Errorf("pause image %s: %w; %s", ref, err, pauseWaysOut)
		}
	}

	return spec.PauseImage{Source: ref, Name: ref}, nil
}

// embeddedPause makes sure that the embedded sandbox image is there. It is used by its ID, since
// its name may be given to another image. What has the name and other content is replaced.
// Unavailable if the engine has not been connected.
func (e *Engine) embeddedPause(ctx context.Context) (spec.PauseImage, error) {
	arch := e.arch.Load()
	if arch == nil {
		return spec.PauseImage{}, fmt.Errorf("pause image: the engine is not connected: %w", errdefs.ErrUnavailable)
	}

	img, err := pause.New(*arch)
	if err != nil {
		return spec.PauseImage{}, err
	}

	if id := e.pauseID.Load(); id != nil && e.images.get(string(*id)) != nil { // image events keep the list up to date
		return spec.PauseImage{Source: string(*id), Name: img.Ref}, nil
	}

	unlock, err := e.loading.Lock(ctx, allKeys) // Docker 29 refuses the same load twice at once
	if err != nil {
		return spec.PauseImage{}, fmt.Errorf("pause image: wait for its load: %w", err)
	}
	defer unlock()

	id, err := e.findPause(ctx, img)
	if err == nil && id == "" {
		id, err = e.loadPause(ctx, img)
	}

	if err != nil {
		return spec.PauseImage{}, err
	}

	e.pauseID.Store(&id)
	e.images.forget(id) // the next list sees that it is pinned

	return spec.PauseImage{Source: string(id), Name: img.Ref}, nil
}

// loadPause loads the embedded pause and returns its ID.
func (e *Engine) loadPause(ctx context.Context, img pause.Image) (model.ImageID, error) {
	if err := e.LoadImage(ctx, bytes.NewReader(img.Archive)); err != nil {
		return "", err
	}

	id, err := e.findPause(ctx, img)
	if err == nil && id == "" {
		err = fmt.Errorf("pause image: the engine has loaded %s with other content: %w", img.Ref,
			errdefs.ErrUnavailable)
	}

	return id, err
}

// isPause compares an image's content and configuration with the embedded pause.
func isPause(in image.InspectResponse, img pause.Image) bool {
	return in.Config != nil && slices.Equal(in.RootFS.Layers, []string{img.DiffID}) &&
		slices.Equal(in.Config.Entrypoint, img.Entrypoint) && len(in.Config.Cmd) == 0 && in.Config.User == ""
}

// findPause returns the ID of the engine's image of this name if its content is the embedded pause,
// "" if not.
func (e *Engine) findPause(ctx context.Context, img pause.Image) (model.ImageID, error) {
	in, err := e.inspectImage(ctx, img.Ref)
	if errdefs.IsNotFound(err) {
		return "", nil
	} else if err != nil {
		return "", wrap(err, "inspect pause image %s", img.Ref)
	}

	id, err := model.ParseImageID(in.ID)
	if err != nil {
		return "", wrap(err, "inspect pause image %s", img.Ref)
	}

	if !isPause(in, img) {
		e.cfg.Log.Warn("an image with the name of the embedded pause has other content and is replaced", "image",
			img.Ref, "id", id)
		return "", nil
	}

	return id, nil
}

const pauseWaysOut = "leave --pod-infra-container-image away to use the embedded image, name one of a mirror that " +
	"this node reaches (docker login for credentials), " +
	"or put it there (docker load, docker pull)"

func (e *Engine) pullPause(ctx context.Context, ref string) error {
	auth, authErr := machineAuth(e.cfg.AuthDir, ref)
	_, err := e.sharedPull(ctx, ref, auth)
	if err != nil && authErr != nil {
		return fmt.Errorf("%w (%w)", err, authErr)
	}
	return err
}

// Resolvable says whether a registry has an image, by asking for its manifest with this machine's
// credentials; nothing is pulled (GET /distribution/{name}/json). Errors are the registry's, or
// ctx's.
func (e *Engine) Resolvable(ctx context.Context, ref string) error {
	auth, authErr := machineAuth(e.cfg.AuthDir, ref)
	_, err := e.docker().DistributionInspect(ctx, ref, client.DistributionInspectOptions{EncodedRegistryAuth: auth})
	if err != nil {
		return errors.Join(wrap(secret.Hide(err, secrets(auth)...), "ask the registry of %s", ref), authErr)
	}
	return nil
}
