package engine

import (
	"context"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/model"
)

// logCheckName is the name of ReachLogDriver's temporary container, which never runs.
const logCheckName = "cri-dockerd-log-driver-check"

// ReachLogDriver checks whether the engine can use a log driver, by creating a container with it.
// The API has no other way: the engine searches for a plugin's socket on first use, in its own
// mount namespace, for up to 15 s. Unavailable means that the engine itself does not respond.
func (e *Engine) ReachLogDriver(ctx context.Context, c model.LogConfig) error {
	image := e.cfg.PauseImage
	// Do not pull: an unreachable registry must not fail the check.
	if image == "" || !e.images.has(image) {
		embedded, err := e.embeddedPause(ctx)
		if err != nil {
			return err
		}
		image = embedded.Source
	}

	remove := func(ctx context.Context) error {
		_, err := e.docker().ContainerRemove(ctx, logCheckName, client.ContainerRemoveOptions{Force: true})
		return wrap(ignore(err, errdefs.IsNotFound), "remove container %s", logCheckName)
	}
	if err := remove(ctx); err != nil { // the leftover of a cancelled check or of a crash
		return err
	}

	_, err := e.docker().ContainerCreate(ctx, client.ContainerCreateOptions{
		Name:   logCheckName,
		Config: &container.Config{Image: image},
		HostConfig: &container.HostConfig{
			NetworkMode: "none",
			LogConfig:   container.LogConfig{Type: c.Driver, Config: c.Options},
		},
	})
	if err != nil {
		return wrap(err, "create container with log driver %s", c.Driver)
	}

	return remove(context.WithoutCancel(ctx))
}
