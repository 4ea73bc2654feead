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
	"cri-dockerd/internal/spec"
)

// HoldImage keeps the layers of an image from being removed, by a container that is never started,
// and returns their directories, the uppermost first. To hold it twice is no error.
// FailedPrecondition if the storage driver does not tell them (all but overlay2).
func (e *Engine) HoldImage(ctx context.Context, imageID model.ImageID) ([]string, error) {
	holder := spec.NewHolder(imageID)
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

// imageLayers are the layers of a container's image by what overlay2 says of the container: all but
// the one that Docker puts above them.
func imageLayers(data map[string]string) ([]string, error) {
	init, layers, _ := strings.Cut(data["LowerDir"], ":")
	if !strings.HasSuffix(init, "-init/diff") || layers == "" {
		return nil, fmt.Errorf("the storage driver does not tell its layers (LowerDir %q): %w", data["LowerDir"],
			errdefs.ErrFailedPrecondition)
	}
	return strings.Split(layers, ":"), nil
}

// ReleaseImage undoes HoldImage. An image that is not held is no error.
func (e *Engine) ReleaseImage(ctx context.Context, imageID model.ImageID) error {
	return ignore(e.remove(ctx, spec.HolderName(imageID)), errdefs.IsNotFound)
}

// HeldImages are the IDs of the images that HoldImage holds.
func (e *Engine) HeldImages(ctx context.Context) ([]model.ImageID, error) {
	list, err := e.list(ctx, make(client.Filters).Add("name", "^/?"+spec.HolderPrefix))
	if err != nil {
		return nil, wrap(err, "list the holders of images")
	}

	var ids []model.ImageID
	for _, c := range list {
		for _, name := range c.Names {
			if id, ok := spec.HeldImage(name); ok {
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
