package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/internal/spec"
)

// imageCache remembers what only an image's inspect says: an ID never changes its meaning, its names do and come from the list.
type imageCache struct {
	mu   sync.Mutex // guards byID
	byID map[string]*spec.Image
}

// named says whether the last look at all images saw one of this name.
func (c *imageCache) named(ref string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, i := range c.byID {
		if i.Named(ref) {
			return true
		}
	}
	return false
}

// Images reads all images that have a name or are nobody's layer (GET /images/json), and inspects those not seen before.
func (e *Engine) Images(ctx context.Context) ([]*spec.Image, error) {
	list, err := e.docker().ImageList(ctx, client.ImageListOptions{})
	if err != nil {
		return nil, wrap(err, "list images")
	}
	e.images.mu.Lock()
	defer e.images.mu.Unlock()
	known := make(map[string]*spec.Image, len(list.Items))
	out := make([]*spec.Image, 0, len(list.Items))
	for _, s := range list.Items {
		in := client.ImageInspectResult{}
		old := e.images.byID[s.ID]
		if old == nil {
			if in, err = e.docker().ImageInspect(ctx, s.ID); errdefs.IsNotFound(err) {
				continue
			} else if err != nil {
				return nil, wrap(err, "inspect image %s", s.ID)
			}
		}
		i := spec.ReadImage(s, in.InspectResponse)
		if old != nil {
			i.User, i.Entrypoint, i.Labels, i.Pinned = old.User, old.Entrypoint, old.Labels, old.Pinned
		}
		known[i.ID] = i
		out = append(out, i)
	}
	e.images.byID = known
	return out, nil
}

// RemoveImage removes one name of an image, or with an ID all of it (DELETE /images/{name}). NotFound if it is not there, Conflict while a
// running container uses it.
func (e *Engine) RemoveImage(ctx context.Context, ref string) error {
	_, err := e.docker().ImageRemove(ctx, ref, client.ImageRemoveOptions{PruneChildren: true})
	return wrap(err, "remove image %s", ref)
}

// HasImage says whether the engine has an image of this name.
func (e *Engine) HasImage(ctx context.Context, ref string) (bool, error) {
	_, err := e.docker().ImageInspect(ctx, ref)
	return err == nil, wrap(ignore(err, errdefs.IsNotFound), "inspect image %s", ref)
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

// streamError reads a stream of progress messages to its end; the engine reports what went wrong in a message, after status 200.
func streamError(r io.Reader) error {
	for d := json.NewDecoder(r); ; {
		var m struct {
			Error string `json:"error"`
		}
		switch err := d.Decode(&m); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case m.Error != "":
			return errors.New(m.Error)
		}
	}
}

// PauseImage makes sure that the sandbox image is there and returns its name: the embedded one, loaded if missing, or the configured one,
// pulled if missing.
func (e *Engine) PauseImage(ctx context.Context) (string, error) {
	if ref := e.cfg.PauseImage; ref != "" {
		if e.images.named(spec.Familiar(ref)) {
			return ref, nil
		}
		if _, err := e.docker().ImageInspect(ctx, ref); !errdefs.IsNotFound(err) {
			return ref, wrap(err, "inspect pause image %s", ref)
		}
		if _, err := e.Pull(ctx, ref, nil); err != nil {
			return "", fmt.Errorf("pause image %s (leave --pod-infra-container-image away to use the embedded one, name a mirror, or load it with docker load): %w", ref, err)
		}
		return ref, nil
	}
	arch := e.arch.Load()
	if arch == nil {
		return "", fmt.Errorf("pause image: the engine is not connected: %w", errdefs.ErrUnavailable)
	}
	archive, ref, err := pause.Image(*arch)
	if err != nil {
		return "", err
	}
	if e.images.named(ref) { // the view keeps the cache in step with image events
		return ref, nil
	}
	e.loading.Lock() // Docker 29 refuses the same load twice at once
	defer e.loading.Unlock()
	if _, err := e.docker().ImageInspect(ctx, ref); !errdefs.IsNotFound(err) {
		return ref, wrap(err, "inspect pause image %s", ref)
	}
	return ref, e.LoadImage(ctx, bytes.NewReader(archive))
}
