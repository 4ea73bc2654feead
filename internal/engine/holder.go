package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

// HoldImage prevents the removal of an image's layers by creating a container without starting it.
// It returns the directories of the layers, topmost first. Holding an image twice is not an error.
// Only overlay2 reports its layers; other storage drivers give FailedPrecondition.
func (e *Engine) HoldImage(ctx context.Context, imageID model.ImageID) ([]string, error) {
	holder := translate.NewHolder(imageID)
	if _, err := e.Create(ctx, holder); err != nil && !errdefs.IsConflict(err) {
		return nil, err
	}

	in, err := e.inspect(ctx, holder.Name)
	if err != nil {
		return nil, wrap(err, "inspect %s", holder.Name)
	}

	layers, err := imageLayers(driverData(in))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hold image %s: %w", imageID, err),
			e.ReleaseImage(context.WithoutCancel(ctx), imageID))
	}

	return layers, nil
}

// imageLayers returns the image layers of a container from the data of overlay2. It drops the init
// layer, added by Docker on top.
func imageLayers(data map[string]string) ([]string, error) {
	init, layers, _ := strings.Cut(data["LowerDir"], ":")
	if !strings.HasSuffix(init, "-init/diff") || layers == "" {
		return nil, fmt.Errorf("storage driver reports no layers (LowerDir %q); overlay2 is required: %w",
			data["LowerDir"], errdefs.ErrFailedPrecondition)
	}
	return strings.Split(layers, ":"), nil
}

// ReleaseImage undoes HoldImage. It succeeds if the image is not held.
func (e *Engine) ReleaseImage(ctx context.Context, imageID model.ImageID) error {
	return ignore(e.remove(ctx, translate.HolderName(imageID)), errdefs.IsNotFound)
}

// HeldImages returns the IDs of the images held by HoldImage.
func (e *Engine) HeldImages(ctx context.Context) ([]model.ImageID, error) {
	list, err := e.list(ctx, make(client.Filters).Add("name", "^/?"+translate.HolderPrefix))
	if err != nil {
		return nil, wrap(err, "list image holder containers")
	}

	var ids []model.ImageID
	for _, c := range list {
		for _, name := range c.Names {
			if id, ok := translate.HeldImage(name); ok {
				ids = append(ids, id)
			}
		}
	}

	return ids, nil
}

func driverData(in container.InspectResponse) map[string]string {
	if in.GraphDriver == nil { // with containerd's image store
		return nil
	}
	return in.GraphDriver.Data
}
