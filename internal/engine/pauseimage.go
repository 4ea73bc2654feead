package engine

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/image"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/internal/model"
)

// PauseImage ensures that the engine has the sandbox image. It loads the embedded image, or pulls
// the configured one with the credentials of this machine, if it is missing.
func (e *Engine) PauseImage(ctx context.Context) (model.PauseImage, error) {
	ref := e.cfg.PauseImage
	if ref == "" {
		return e.embeddedPause(ctx)
	}
	if e.images.has(ref) {
		return model.PauseImage{Source: ref, Name: ref}, nil
	}

	if _, err := e.inspectImage(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
		return model.PauseImage{}, wrap(err, "inspect pause image %s", ref)
	} else if err != nil {
		if err := e.pullPause(ctx, ref); err != nil {
			return model.PauseImage{}, fmt.Errorf("pause image %s: %w; %s", ref, err, pauseRemedies)
		}
	}

	return model.PauseImage{Source: ref, Name: ref}, nil
}

// embeddedPause ensures that the engine has the embedded sandbox image. Callers use its ID, because
// its name may be assigned to another image. An image with the name and other content is replaced.
// The error is Unavailable before the first connection to the engine.
func (e *Engine) embeddedPause(ctx context.Context) (model.PauseImage, error) {
	arch := e.arch.Load()
	if arch == nil {
		return model.PauseImage{}, fmt.Errorf("pause image: not connected to the engine: %w", errdefs.ErrUnavailable)
	}

	img, err := pause.New(*arch)
	if err != nil {
		return model.PauseImage{}, err
	}

	if id := e.pauseID.Load(); id != nil && e.images.get(string(*id)) != nil { // image events keep the list up to date
		return embeddedImage(*id, img), nil
	}

	unlock, err := e.loading.Lock(ctx, allKeys) // Docker 29 rejects concurrent loads of one image
	if err != nil {
		return model.PauseImage{}, fmt.Errorf("pause image: wait for a load in progress: %w", err)
	}
	defer unlock()

	id, err := e.findPause(ctx, img)
	if err == nil && id == "" {
		id, err = e.loadPause(ctx, img)
	}

	if err != nil {
		return model.PauseImage{}, err
	}

	e.pauseID.Store(&id)

	return embeddedImage(id, img), nil
}

func embeddedImage(id model.ImageID, img pause.Image) model.PauseImage {
	return model.PauseImage{Source: string(id), Name: img.Ref, Seccomp: pause.Seccomp}
}

// loadPause loads the embedded pause image and returns its ID.
func (e *Engine) loadPause(ctx context.Context, img pause.Image) (model.ImageID, error) {
	if err := e.LoadImage(ctx, bytes.NewReader(img.Archive)); err != nil {
		return "", err
	}

	id, err := e.findPause(ctx, img)
	if err == nil && id == "" {
		err = fmt.Errorf("pause image: engine loaded %s with unexpected content: %w", img.Ref,
			errdefs.ErrUnavailable)
	}

	return id, err
}

// isPause reports whether an image has the content and configuration of the embedded pause image.
func isPause(in image.InspectResponse, img pause.Image) bool {
	return in.Config != nil && slices.Equal(in.RootFS.Layers, []string{img.DiffID}) &&
		slices.Equal(in.Config.Entrypoint, img.Entrypoint) && len(in.Config.Cmd) == 0 && in.Config.User == ""
}

// findPause returns the ID of the engine's image with the name of the embedded pause image, or ""
// if it does not exist or has other content.
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
		e.cfg.Log.Warn("replacing an image with the name of the embedded pause image and other content",
			"image", img.Ref, "id", id)
		return "", nil
	}

	return id, nil
}

const pauseRemedies = "remove --pod-infra-container-image to use the embedded image, set it to an image in a " +
	"registry that this node can reach (docker login for credentials), or add the image to this node (docker load, " +
	"docker pull)"

func (e *Engine) pullPause(ctx context.Context, ref string) error {
	auth, authErr := machineAuth(e.cfg.AuthDir, ref)
	_, err := e.sharedPull(ctx, ref, auth)
	if err != nil && authErr != nil {
		return fmt.Errorf("%w (%w)", err, authErr)
	}
	return err
}
