package engine

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/engine/tolerant"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

// Limits of decoded responses. Kubernetes limits the annotations of an object to 256 KiB. JSON
// encoded in a JSON string takes up to six times the space.
var (
	// inspectLimits apply to containers and to images. Labels arrive sorted by key, so with equal
	// limits the kept labels of an image include all those kept of its containers.
	inspectLimits = tolerant.Limits{
		Text:     64 << 10,
		Group:    256 << 10,
		Total:    16 << 20,
		Keep:     translate.IsEssential,
		KeptText: 2 << 20,
	}
	listLimits = tolerant.Limits{
		Text:     4 << 10,
		Group:    16 << 10,
		Total:    64 << 20,
		Keep:     translate.IsEssential,
		KeptText: 1 << 20,
	}
	imageListLimits = tolerant.Limits{Text: 4 << 10, Group: 256 << 10, Total: 64 << 20}
	infoLimits      = tolerant.Limits{Text: 4 << 10, Group: 64 << 10, Total: 1 << 20}
	messageLimits   = tolerant.Limits{Text: 64 << 10, Group: 64 << 10, Total: 1 << 20}
)

// decodeError turns a decoding error into DataLoss. It is not Unavailable, because the engine may
// fail to describe a single object only.
func decodeError(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("decode the engine's response: %w: %w", errdefs.ErrDataLoss, err)
}

// invalidID returns the error for a response without a valid ID. The engine is at fault, not the
// caller, so the error is Internal.
func invalidID(err error) error {
	//nolint:errorlint // the kind of err refers to a request
	return fmt.Errorf("engine returned an invalid Id: %v: %w", err, errdefs.ErrInternal)
}

// inspect inspects a container by ID or name (GET /containers/{id}/json). It skips unreadable
// fields.
func (e *Engine) inspect(ctx context.Context, ref string) (container.InspectResponse, error) {
	var in container.InspectResponse
	err := e.decode(ctx, ref, &in, inspectLimits, func(ctx context.Context) error {
		_, err := e.docker().ContainerInspect(ctx, ref, client.ContainerInspectOptions{})
		return err
	})
	if err != nil {
		return in, err
	}

	if _, err := model.ParseContainerID(in.ID); err != nil {
		return container.InspectResponse{}, invalidID(err)
	}

	return in, nil
}

// inspectImage inspects an image by name or ID (GET /images/{name}/json).
func (e *Engine) inspectImage(ctx context.Context, ref string) (image.InspectResponse, error) {
	var in image.InspectResponse
	err := e.decode(ctx, ref, &in, inspectLimits, func(ctx context.Context) error {
		_, err := e.docker().ImageInspect(ctx, ref)
		return err
	})
	if err != nil {
		return in, err
	}

	if _, err := model.ParseImageID(in.ID); err != nil {
		return image.InspectResponse{}, invalidID(err)
	}

	return in, nil
}

// info reads the engine's system information (GET /info).
func (e *Engine) info(ctx context.Context) (system.Info, error) {
	var in system.Info
	err := e.decode(ctx, "info", &in, infoLimits, func(ctx context.Context) error {
		_, err := e.docker().Info(ctx, client.InfoOptions{})
		return err
	})
	return in, err
}

// decode decodes the response to one request into target. It logs skipped fields once per object.
func (e *Engine) decode(
	ctx context.Context, object string, target any, l tolerant.Limits, call func(context.Context) error,
) error {
	return readResponse(ctx, call, func(body io.Reader) error {
		skipped, err := tolerant.Decode(body, target, l)
		e.reportSkipped(object, skipped)
		return decodeError(err)
	})
}

// listedContainer has the fields used of a container in the engine's list.
type listedContainer struct {
	ID         string `json:"Id"`
	Names      []string
	ImageID    string
	State      string
	Status     string
	Created    int64
	Labels     map[string]string
	HostConfig struct{ NetworkMode string }
}

// name returns the container's own name without the slash, or "" if the engine lists none. Its
// other names belong to links.
func (c *listedContainer) name() string {
	for _, n := range c.Names {
		if strings.Count(n, "/") == 1 {
			return strings.TrimPrefix(n, "/")
		}
	}
	return ""
}

// list lists the containers matching the filters, running or not (GET /containers/json). It skips
// entries without a valid ID.
func (e *Engine) list(ctx context.Context, filters client.Filters) ([]listedContainer, error) {
	var all []listedContainer
	err := readResponse(ctx, func(ctx context.Context) error {
		_, err := e.docker().ContainerList(ctx, client.ContainerListOptions{All: true, Filters: filters})
		return err
	}, func(body io.Reader) error {
		return decodeError(tolerant.Each(body, listLimits, func(c *listedContainer, skipped []string) error {
			if _, err := model.ParseContainerID(c.ID); err != nil {
				e.reportSkipped("container list", []string{err.Error()})
				return nil
			}

			e.reportSkipped("container list entry "+c.ID, skipped)
			all = append(all, *c)
			return nil
		}))
	})

	return all, err
}

// listImages lists the images (GET /images/json). It skips entries without a valid ID.
func (e *Engine) listImages(ctx context.Context) ([]image.Summary, error) {
	var all []image.Summary
	err := readResponse(ctx, func(ctx context.Context) error {
		_, err := e.docker().ImageList(ctx, client.ImageListOptions{})
		return err
	}, func(body io.Reader) error {
		return decodeError(tolerant.Each(body, imageListLimits, func(i *listedImage, skipped []string) error {
			if _, err := model.ParseImageID(i.ID); err != nil {
				e.reportSkipped("image list", []string{err.Error()})
				return nil
			}

			e.reportSkipped("image list entry "+i.ID, skipped)
			all = append(all, image.Summary{
				ID:          i.ID,
				RepoTags:    i.RepoTags,
				RepoDigests: i.RepoDigests,
				Size:        i.Size,
			})
			return nil
		}))
	})

	return all, err
}

// listedImage has the fields used of an image in the engine's list.
type listedImage struct {
	ID          string `json:"Id"`
	RepoTags    []string
	RepoDigests []string
	Size        int64
}

// reportedObjects is the set of objects with a logged warning, to log each object once. The zero
// value is ready to use.
type reportedObjects struct {
	mu  sync.Mutex // guards set
	set map[string]bool
}

// maxReported bounds the set. When it is full, it is cleared, and objects may be logged again.
const maxReported = 1024

// add adds an object and reports whether it is new.
func (r *reportedObjects) add(object string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()

	if r.set[object] {
		return false
	}
	if r.set == nil || len(r.set) >= maxReported {
		r.set = map[string]bool{}
	}

	r.set[object] = true

	return true
}

// reportSkipped logs the unreadable fields of an object.
func (e *Engine) reportSkipped(object string, fields []string) {
	if len(fields) > 0 && e.skipped.add(object) {
		e.cfg.Log.Warn("skipped unreadable fields in the engine's response", "object", object, "fields", fields)
	}
}
