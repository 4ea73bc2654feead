package engine

import (
	"context"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/spec"
)

// logCheckName is the container that ReachLogDriver makes and removes; it never runs.
const logCheckName = "cri-dockerd-log-driver-check"

// ReachLogDriver finds out whether the engine can use a log driver, by making a container with it.
// There is no other way to ask: the engine looks for a plugin's socket in its own mount namespace
// when it needs it, for up to 15 s. Unavailable means that the engine itself does not answer.
func (e *Engine) ReachLogDriver(ctx context.Context, c spec.LogConfig) error {
	image := e.cfg.PauseImage
	// a registry that cannot be reached says nothing about logs
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
	if err := remove(ctx); err != nil { // left by a check that was given up, or by a crash
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
		return wrap(err, "create a container with log driver %s", c.Driver)
	}

	return remove(context.WithoutCancel(ctx))
}
