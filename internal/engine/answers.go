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
	"cri-dockerd/internal/spec"
)

// Limits of what is kept of answers. Kubernetes bounds the annotations of an object to 256 KiB;
// JSON within JSON is up to six times as long.
var (
	// inspectLimits are for containers and for images, so that of an image's labels at least those
	// are known that are kept of its containers: both come in order of their keys.
	inspectLimits = tolerant.Limits{
		Text:     64 << 10,
		Group:    256 << 10,
		Total:    16 << 20,
		Keep:     spec.IsKept,
		KeptText: 2 << 20,
	}
	listLimits = tolerant.Limits{
		Text:     4 << 10,
		Group:    16 << 10,
		Total:    64 << 20,
		Keep:     spec.IsKept,
		KeptText: 1 << 20,
	}
	imageListLimits = tolerant.Limits{Text: 4 << 10, Group: 256 << 10, Total: 64 << 20}
	infoLimits      = tolerant.Limits{Text: 4 << 10, Group: 64 << 10, Total: 1 << 20}
	messageLimits   = tolerant.Limits{Text: 64 << 10, Group: 64 << 10, Total: 1 << 20}
)

// unreadable gives an error of decoding its kind. It is not Unavailable: the engine may be unable
// to describe one object only.
func unreadable(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("the engine's answer cannot be read: %w: %w", errdefs.ErrDataLoss, err)
}

// badID is the error of an answer without a valid ID. That is the engine's fault, not the caller's.
func badID(err error) error {
	return fmt.Errorf("the engine's answer: Id: %v: %w", err,
		errdefs.ErrInternal) //nolint:errorlint // its kind is about a request
}

// inspect reads a container as the engine describes it (GET /containers/{id}/json), by ID or name.
// What cannot be read of it is left out.
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
		return container.InspectResponse{}, badID(err)
	}

	return in, nil
}

// inspectImage reads an image as the engine describes it (GET /images/{name}/json).
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
		return image.InspectResponse{}, badID(err)
	}

	return in, nil
}

// info reads what the engine says of itself (GET /info).
func (e *Engine) info(ctx context.Context) (system.Info, error) {
	var in system.Info
	err := e.decode(ctx, "info", &in, infoLimits, func(ctx context.Context) error {
		_, err := e.docker().Info(ctx, client.InfoOptions{})
		return err
	})
	return in, err
}

// decode reads the answer to one request into target and reports once per object what it left out.
func (e *Engine) decode(
	ctx context.Context, object string, target any, l tolerant.Limits, call func(context.Context) error,
) error {
	return ask(ctx, call, func(body io.Reader) error {
		left, err := tolerant.Decode(body, target, l)
		e.reportLeftOut(object, left)
		return unreadable(err)
	})
}

// listedContainer is a container in the engine's list, as far as it is read.
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

// name is the container's own name without slash, "" if the engine gives none; the other names are
// of links.
func (c *listedContainer) name() string {
	for _, n := range c.Names {
		if strings.Count(n, "/") == 1 {
			return strings.TrimPrefix(n, "/")
		}
	}
	return ""
}

// list reads the containers that match the filters, running or not (GET /containers/json). One
// without a valid ID is left out.
func (e *Engine) list(ctx context.Context, filters client.Filters) ([]listedContainer, error) {
	var all []listedContainer
	err := ask(ctx, func(ctx context.Context) error {
		_, err := e.docker().ContainerList(ctx, client.ContainerListOptions{All: true, Filters: filters})
		return err
	}, func(body io.Reader) error {
		return unreadable(tolerant.Each(body, listLimits, func(c *listedContainer, left []string) error {
			if _, err := model.ParseContainerID(c.ID); err != nil {
				e.reportLeftOut("list of containers", []string{err.Error()})
				return nil
			}
			e.reportLeftOut(c.ID+" in the list", left)
			all = append(all, *c)
			return nil
		}))
	})

	return all, err
}

// listImages reads the images (GET /images/json). One without a valid ID is left out.
func (e *Engine) listImages(ctx context.Context) ([]image.Summary, error) {
	var all []image.Summary
	err := ask(ctx, func(ctx context.Context) error {
		_, err := e.docker().ImageList(ctx, client.ImageListOptions{})
		return err
	}, func(body io.Reader) error {
		return unreadable(tolerant.Each(body, imageListLimits, func(i *listedImage, left []string) error {
			if _, err := model.ParseImageID(i.ID); err != nil {
				e.reportLeftOut("list of images", []string{err.Error()})
				return nil
			}
			e.reportLeftOut(i.ID+" in the list", left)
			all = append(all, image.Summary{ID: i.ID, RepoTags: i.RepoTags, RepoDigests: i.RepoDigests, Size: i.Size})
			return nil
		}))
	})

	return all, err
}

// listedImage is an image in the engine's list, as far as it is read.
type listedImage struct {
	ID          string `json:"Id"`
	RepoTags    []string
	RepoDigests []string
	Size        int64
}

// leftOut remembers which objects were reported, so that each is reported once. The zero value is
// ready.
type leftOut struct {
	mu       sync.Mutex // guards reported
	reported map[string]bool
}

const maxReported = 1024 // objects that are remembered; then the reports begin anew

func (l *leftOut) first(object string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()

	if l.reported[object] {
		return false
	}
	if l.reported == nil || len(l.reported) >= maxReported {
		l.reported = map[string]bool{}
	}

	l.reported[object] = true

	return true
}

// reportLeftOut logs which fields of an object in an answer could not be read.
func (e *Engine) reportLeftOut(object string, fields []string) {
	if len(fields) > 0 && e.leftOut.first(object) {
		e.cfg.Log.Warn("fields of the engine's answer cannot be read and are left out", "object", object, "fields",
			fields)
	}
}
