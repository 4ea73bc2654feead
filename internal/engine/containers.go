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
	"cri-dockerd/internal/spec"
)

// inspects is how many inspects run at once when everything is read.
const inspects = 8

// inspectTimeout is for one inspect, which takes milliseconds, or seconds on a busy machine if an
// image has brought megabytes of labels. A container on which the engine hangs blocks it for ever.
const inspectTimeout = 10 * time.Second

// createDeadline is for the engine's answer to a create, which takes about 10 ms.
const createDeadline = 2 * time.Minute

// Create makes a container (POST /containers/create) and returns its ID. A name in use is a
// Conflict. Once asked, the engine's answer is waited for, whatever becomes of ctx: a create that
// was given up would happen behind the back of whoever undoes it.
func (e *Engine) Create(ctx context.Context, c *spec.Create) (model.ContainerID, error) {
	if ctx.Err() != nil {
		return "", wrap(ctx.Err(), "create container %s", c.Name)
	}

	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createDeadline)
	defer cancel()

	r, err := e.docker().ContainerCreate(ctx, client.ContainerCreateOptions{
		Name:       c.Name,
		Config:     c.Config,
		HostConfig: c.Host,
	})
	if err != nil {
		return "", wrap(err, "create container %s", c.Name)
	}

	for _, w := range r.Warnings {
		e.cfg.Log.Debug("the engine warns", "container", c.Name, "warning", w)
	}

	id, err := model.ParseContainerID(r.ID)
	if err != nil {
		return "", wrap(badID(err), "create container %s", c.Name)
	}

	return id, nil
}

// Start starts a container (POST /containers/{id}/start). A running one is no error.
func (e *Engine) Start(ctx context.Context, id model.ContainerID) error {
	_, err := e.docker().ContainerStart(ctx, string(id), client.ContainerStartOptions{})
	return wrap(err, "start container %s", id)
}

// Stop sends the container's stop signal and, after grace, SIGKILL, and returns when it has ended.
// Docker counts in whole seconds; grace is rounded up. With a grace of 0 the container gets SIGKILL
// alone (POST /containers/{id}/kill): Docker's stop would send the stop signal first even then, and
// the container's own answer to it could win. A stopped container is no error, an unknown one
// NotFound.
func (e *Engine) Stop(ctx context.Context, id model.ContainerID, grace time.Duration) error {
	if grace == 0 {
		_, err := e.docker().ContainerKill(ctx, string(id), client.ContainerKillOptions{Signal: "SIGKILL"})
		if !errdefs.IsConflict(err) {
			return wrap(err, "kill container %s", id)
		}
		// It does not run, or starts just now: stop knows both.
	}

	seconds := int(math.Ceil(grace.Seconds()))
	_, err := e.docker().ContainerStop(ctx, string(id), client.ContainerStopOptions{Timeout: &seconds})

	return wrap(err, "stop container %s", id)
}

// Remove removes a container by force with its anonymous volumes. An unknown one is NotFound; one
// whose removal is under way already is waited for.
func (e *Engine) Remove(ctx context.Context, id model.ContainerID) error {
	return e.remove(ctx, string(id))
}

// remove is Remove of a container by its ID or its name.
func (e *Engine) remove(ctx context.Context, id string) error {
	for {
		_, err := e.docker().ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		if !errdefs.IsConflict(err) {
			return wrap(err, "remove container %s", id)
		}

		select {
		case <-ctx.Done():
			return wrap(err, "remove container %s", id)
		case <-time.After(50 * time.Millisecond): // another caller's removal is under way
		}
	}
}

// Update changes the resources that Docker knows (POST /containers/{id}/update); Limit has the
// others.
func (e *Engine) Update(ctx context.Context, id model.ContainerID, u *spec.Update) error {
	_, err := e.docker().ContainerUpdate(ctx, string(id), client.ContainerUpdateOptions{Resources: &u.Resources})
	return wrap(err, "update container %s", id)
}

// Inspect reads one container anew. An unknown one is NotFound; one that is not ours gives an empty
// object.
func (e *Engine) Inspect(ctx context.Context, id model.ContainerID) (spec.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, e.inspectTimeout)
	defer cancel()

	in, err := e.inspect(ctx, string(id))
	if err != nil {
		return spec.Object{}, wrap(err, "inspect container %s", id)
	}

	o, err := e.read(ctx, in)
	if err != nil {
		return spec.Object{}, wrap(err, "inspect container %s", id)
	}

	e.measure(o.Container)

	return o, nil
}

// read translates the answer to an inspect. It needs the labels of the container's image, which
// Docker has merged into the container's own.
func (e *Engine) read(ctx context.Context, in container.InspectResponse) (spec.Object, error) {
	image, err := e.imageLabels(ctx, in.Image)
	if err != nil {
		return spec.Object{}, err
	}
	return spec.Read(in, image)
}

// FindByName is the container with this name (without slash) and what it is; NotFound if there is
// none.
func (e *Engine) FindByName(ctx context.Context, name string) (model.ContainerID, spec.Object, error) {
	in, err := e.inspect(ctx, name)
	if err != nil {
		return "", spec.Object{}, wrap(err, "find container %s", name)
	}

	if in.Name != "/"+name { // Docker also finds by a prefix of the ID
		return "", spec.Object{}, fmt.Errorf("find container %s: %w", name, errdefs.ErrNotFound)
	}

	id, err := model.ParseContainerID(in.ID)
	if err != nil {
		return "", spec.Object{}, wrap(err, "find container %s", name)
	}

	o, err := e.read(ctx, in)
	if errdefs.IsDataLoss(err) { // it has the name and is none of ours
		return id, spec.Object{}, nil
	}

	return id, o, wrap(err, "find container %s", name)
}

// Objects reads every container of ours (list, then inspect). One that vanishes meanwhile is left
// out. One that the engine cannot describe in time is Unread, with what the list says of it: a
// hanging container must not hide the others.
func (e *Engine) Objects(ctx context.Context) ([]spec.Object, error) {
	list, err := e.list(ctx, make(client.Filters).Add("label", spec.OurLabel))
	if err != nil {
		return nil, wrap(err, "list containers")
	}

	out := make([]spec.Object, len(list))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(inspects)
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

// object reads one container of a list. It fails only if the engine is not there, or ctx has ended.
func (e *Engine) object(ctx context.Context, item listedContainer, late *stragglers) (spec.Object, error) {
	inspectCtx, done := late.begin(ctx)
	o, err := e.Inspect(inspectCtx, model.ContainerID(item.ID))
	done()
	if err == nil || errdefs.IsNotFound(err) {
		return o, nil
	}

	if unanswered(ctx, err) {
		return spec.Object{}, err
	}

	e.cfg.Log.Warn("a container that Docker cannot describe is shown as the list has it", "container", item.ID, "names",
		item.Names, "err", err)
	image := spec.ImageLabels{Unknown: true}
	if i := e.images.get(item.ImageID); i != nil {
		image = i.Brings()
	}

	return spec.ReadListed(spec.Listed{
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

// Ping asks the engine for a sign of life (GET /_ping).
func (e *Engine) Ping(ctx context.Context) error {
	_, err := e.docker().Ping(ctx, client.PingOptions{})
	return wrap(err, "ping the engine")
}
