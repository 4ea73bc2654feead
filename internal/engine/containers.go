package engine

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

// maxInspects is the maximum number of concurrent inspects while all containers are read.
const maxInspects = 8

// inspectTimeout bounds one inspect. An inspect takes milliseconds, or seconds on a busy machine if
// the image has megabytes of labels. If the engine hangs on a container, its inspect never returns.
const inspectTimeout = 10 * time.Second

// createTimeout bounds a create, which usually takes about 10 ms.
const createTimeout = 2 * time.Minute

// Create creates a container (POST /containers/create) and returns its ID. A name in use is a
// Conflict. After sending the request, Create waits for the response even if ctx ends: a cancelled
// create could still succeed later, after the caller has cleaned up.
func (e *Engine) Create(ctx context.Context, c *translate.Create) (model.ContainerID, error) {
	if ctx.Err() != nil {
		return "", wrap(ctx.Err(), "create container %s", c.Name)
	}

	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createTimeout)
	defer cancel()
	return e.createUntil(ctx, c)
}

// createUntil is Create without the wait after the end of ctx. The container may still be created
// later.
func (e *Engine) createUntil(ctx context.Context, c *translate.Create) (model.ContainerID, error) {
	r, err := e.docker().ContainerCreate(ctx, client.ContainerCreateOptions{
		Name:       c.Name,
		Config:     c.Config,
		HostConfig: c.Host,
	})
	if err != nil {
		return "", wrap(err, "create container %s", c.Name)
	}

	for _, w := range r.Warnings {
		e.cfg.Log.Debug("engine returned a warning", "container", c.Name, "warning", w)
	}

	id, err := model.ParseContainerID(r.ID)
	if err != nil {
		return "", wrap(invalidID(err), "create container %s", c.Name)
	}

	return id, nil
}

// Start starts a container (POST /containers/{id}/start). It succeeds if the container is running.
func (e *Engine) Start(ctx context.Context, id model.ContainerID) error {
	_, err := e.docker().ContainerStart(ctx, string(id), client.ContainerStartOptions{})
	return wrap(err, "start container %s", id)
}

// Stop sends the stop signal of a container and, after the grace period, SIGKILL. It returns when
// the container has exited. Docker's unit is seconds, so grace is rounded up. With a grace period
// of 0 the container gets only SIGKILL (POST /containers/{id}/kill): Docker's stop would send the
// stop signal first, and the container could exit because of it. Stop succeeds if the container is
// stopped. An unknown container is NotFound.
func (e *Engine) Stop(ctx context.Context, id model.ContainerID, grace time.Duration) error {
	if grace == 0 {
		_, err := e.docker().ContainerKill(ctx, string(id), client.ContainerKillOptions{Signal: "SIGKILL"})
		if !errdefs.IsConflict(err) {
			return wrap(err, "kill container %s", id)
		}
		// The container is not running, or it is just starting. Stop handles both.
	}

	seconds := int(math.Ceil(grace.Seconds()))
	_, err := e.docker().ContainerStop(ctx, string(id), client.ContainerStopOptions{Timeout: &seconds})

	return wrap(err, "stop container %s", id)
}

// Remove forcibly removes a container and its anonymous volumes. It waits for a removal in
// progress. An unknown container is NotFound.
func (e *Engine) Remove(ctx context.Context, id model.ContainerID) error {
	return e.remove(ctx, string(id))
}

// remove is Remove by ID or name.
func (e *Engine) remove(ctx context.Context, id string) error {
	for {
		_, err := e.docker().ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		if !errdefs.IsConflict(err) {
			return wrap(err, "remove container %s", id)
		}

		select {
		case <-ctx.Done():
			return wrap(err, "remove container %s", id)
		case <-time.After(50 * time.Millisecond): // another removal is in progress
		}
	}
}

// Update changes the resources supported by Docker's API (POST /containers/{id}/update). Limit
// changes the others.
func (e *Engine) Update(ctx context.Context, id model.ContainerID, u *translate.Update) error {
	_, err := e.docker().ContainerUpdate(ctx, string(id), client.ContainerUpdateOptions{Resources: &u.Resources})
	return wrap(err, "update container %s", id)
}

// Inspect reads the current state of a container. An unknown container is NotFound. A container not
// managed by this program gives an empty object.
func (e *Engine) Inspect(ctx context.Context, id model.ContainerID) (model.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, e.inspectTimeout)
	defer cancel()

	in, err := e.inspect(ctx, string(id))
	if err != nil {
		return model.Object{}, wrap(err, "inspect container %s", id)
	}

	o, err := e.read(ctx, in)
	if err != nil {
		return model.Object{}, wrap(err, "inspect container %s", id)
	}

	return o, nil
}

// read translates the response to an inspect. It needs the labels of the image, because Docker
// merges them into the labels of the container.
func (e *Engine) read(ctx context.Context, in container.InspectResponse) (model.Object, error) {
	image, err := e.imageLabels(ctx, in.Image)
	if err != nil {
		return model.Object{}, err
	}
	o, err := translate.Read(in, image)
	if o.Container != nil && e.cfg.Adjustments != "" {
		o.Container.Process = translate.ReadProcess(in)
	}

	return o, err
}

// FindByName returns the ID and the object of the container with this name (without slash), or
// NotFound.
func (e *Engine) FindByName(ctx context.Context, name string) (model.ContainerID, model.Object, error) {
	in, err := e.inspect(ctx, name)
	if err != nil {
		return "", model.Object{}, wrap(err, "find container %s", name)
	}

	if in.Name != "/"+name { // Docker also accepts a prefix of an ID
		return "", model.Object{}, fmt.Errorf("find container %s: %w", name, errdefs.ErrNotFound)
	}

	id, err := model.ParseContainerID(in.ID)
	if err != nil {
		return "", model.Object{}, wrap(err, "find container %s", name)
	}

	o, err := e.read(ctx, in)
	if errdefs.IsDataLoss(err) { // a container with this name, but not managed by this program
		return id, model.Object{}, nil
	}

	return id, o, wrap(err, "find container %s", name)
}

// Objects lists and inspects all containers managed by this program. It skips containers removed in
// the meantime. A container without a timely inspect response is Unread and has only the data of
// the list, so that a hanging container does not hide the others.
func (e *Engine) Objects(ctx context.Context) ([]model.Object, error) {
	list, err := e.list(ctx, make(client.Filters).Add("label", translate.PodLabel))
	if err != nil {
		return nil, wrap(err, "list containers")
	}

	out := make([]model.Object, len(list))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxInspects)
	late := newStragglers(ctx, e.Ping)
	defer late.stop()

	for i, item := range list {
		g.Go(func() (err error) {
			out[i], err = e.object(ctx, item, late)
			return err
		})
	}

	return out, g.Wait()
}

// object inspects one container of a list. It fails only if the engine is unavailable or ctx has
// ended.
func (e *Engine) object(ctx context.Context, item listedContainer, late *stragglers) (model.Object, error) {
	inspectCtx, done := late.begin(ctx)
	o, err := e.Inspect(inspectCtx, model.ContainerID(item.ID))
	done()
	if err == nil || errdefs.IsNotFound(err) {
		return o, nil
	}

	if isUnanswered(ctx, err) {
		return model.Object{}, err
	}

	e.cfg.Log.Warn("failed to inspect container; using the engine's container list instead",
		"container", item.ID, "names", item.Names, "err", err)
	image := model.ImageLabels{Unknown: true}
	if i := e.images.get(item.ImageID); i != nil {
		image = i.InheritedLabels()
	}

	return translate.ReadListed(translate.Listed{
		ID:          model.ContainerID(item.ID),
		Name:        item.name(),
		ImageID:     item.ImageID,
		State:       item.State,
		Status:      item.Status,
		Created:     item.Created,
		NetworkMode: item.HostConfig.NetworkMode,
		Labels:      item.Labels,
	}, image), nil
}

// Ping checks whether the engine responds (GET /_ping).
func (e *Engine) Ping(ctx context.Context) error {
	_, err := e.docker().Ping(ctx, client.PingOptions{})
	return wrap(err, "ping the engine")
}
