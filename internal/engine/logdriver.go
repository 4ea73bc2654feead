package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/model"
)

// logCheckName is the name of ReachLogDriver's temporary container, which never runs.
const logCheckName = "cri-dockerd-log-driver-check"

// logCheckTimeouts are the timeouts of ReachLogDriver's steps. Each step has its own: the first
// load of the pause image may take longer than all others together.
type logCheckTimeouts struct {
	// prepare limits the load of the pause image. Slow disks take 20 s.
	prepare time.Duration
	// create limits the creation of a container with the driver. The engine searches for the socket
	// of a plugin for 15 s and then responds with an error.
	create time.Duration
	ping   time.Duration
	remove time.Duration
}

var defaultLogCheckTimeouts = logCheckTimeouts{
	prepare: 2 * time.Minute,
	create:  20 * time.Second,
	ping:    5 * time.Second,
	remove:  20 * time.Second,
}

// ReachLogDriver checks whether the engine can use a log driver, by creating a container with it.
// The API has no other way: the engine searches for a plugin's socket on first use, in its own
// mount namespace. Unavailable means that nothing is known about the driver, because the engine
// does not respond or another step failed. Any other error means that the engine cannot use the
// driver.
func (e *Engine) ReachLogDriver(ctx context.Context, c model.LogConfig) error {
	image, err := e.prepareLogCheck(ctx)
	if err != nil {
		return unknownDriver(err)
	}

	err = e.createLogCheck(ctx, image, c)
	if err != nil {
		return err
	}

	if err := e.removeLogCheck(context.WithoutCancel(ctx)); err != nil {
		return unknownDriver(err)
	}

	return nil
}

// unknownDriver returns the error of a step other than the check of the driver.
func unknownDriver(err error) error {
	return fmt.Errorf("cannot check the log driver: %w", asUnavailable(err))
}

// prepareLogCheck returns the image for the temporary container, and removes the leftover of a
// cancelled check or of a crash.
func (e *Engine) prepareLogCheck(ctx context.Context) (image string, err error) {
	ctx, cancel := context.WithTimeout(ctx, e.logCheck.prepare)
	defer cancel()

	image = e.cfg.PauseImage
	// Do not pull: an unreachable registry must not fail the check.
	if image == "" || !e.images.has(image) {
		embedded, err := e.embeddedPause(ctx)
		if err != nil {
			return "", err
		}
		image = embedded.Source
	}

	return image, e.removeLogCheck(ctx)
}

// createLogCheck creates the temporary container.
func (e *Engine) createLogCheck(ctx context.Context, image string, c model.LogConfig) error {
	createCtx, cancel := context.WithTimeout(ctx, e.logCheck.create)
	defer cancel()

	_, err := e.docker().ContainerCreate(createCtx, client.ContainerCreateOptions{
		Name:   logCheckName,
		Config: &container.Config{Image: image},
		HostConfig: &container.HostConfig{
			NetworkMode: "none",
			LogConfig:   container.LogConfig{Type: c.Driver, Config: c.Options},
		},
	})
	if err == nil {
		return nil
	}

	err = wrap(err, "create container with log driver %s", c.Driver)
	switch {
	case errdefs.IsInvalidArgument(err): // the engine's error about log drivers and their options
		return err
	// The engine waits for the driver while it responds to other calls.
	case createCtx.Err() != nil && ctx.Err() == nil && e.isResponding(ctx):
		return fmt.Errorf("no response within %s: %w", e.logCheck.create, err)
	}

	return unknownDriver(err)
}

// isResponding reports whether the engine responds to a ping.
func (e *Engine) isResponding(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, e.logCheck.ping)
	defer cancel()
	return e.Ping(ctx) == nil
}

// removeLogCheck removes the temporary container, if it exists.
func (e *Engine) removeLogCheck(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, e.logCheck.remove)
	defer cancel()
	_, err := e.docker().ContainerRemove(ctx, logCheckName, client.ContainerRemoveOptions{Force: true})
	return wrap(ignore(err, errdefs.IsNotFound), "remove container %s", logCheckName)
}
