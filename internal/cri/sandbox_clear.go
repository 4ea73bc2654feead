package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

const (
	// undoRetryDelay is the pause before the second attempt of an undo. The third waits five times
	// as long.
	undoRetryDelay = 100 * time.Millisecond
	undoAttempts   = 3
	// quickFailure is the longest duration of a failed attempt that is worth a retry. A longer one
	// has waited for something unresponsive.
	quickFailure = 10 * time.Second
)

// undoSandbox removes the objects created by a failed call. It retries quick failures: after an
// interrupted ADD, a plugin's first DEL may fail and the second succeed. The bridge plugin, for
// example, fails at a missing rule, and skips the rules once the interface is removed.
func (s *Service) undoSandbox(ctx context.Context, name string, created model.ContainerID) error {
	remove := func() error {
		if created == "" { // a create may have succeeded although canceled or its response lost
			return s.removeByName(ctx, name, "")
		}
		// Also cleans up if someone has removed the pause container meanwhile.
		return s.removeByID(ctx, created)
	}

	delay := undoRetryDelay
	for try := 1; ; try++ {
		began := time.Now()
		err := remove()
		if err == nil || try == undoAttempts || time.Since(began) > quickFailure {
			return err
		}

		select {
		case <-ctx.Done():
			return err
		case <-time.After(delay):
		}

		delay *= 5
	}
}

// clearSandbox removes a leftover of an earlier attempt under a name. If the pod is complete, it
// returns the pod's ID instead. AlreadyExists if the container with this name is not a sandbox of
// this daemon.
func (s *Service) clearSandbox(ctx context.Context, name string) (ready model.ContainerID, err error) {
	id, o, err := s.Engine.FindByName(ctx, name)
	if err != nil {
		return "", ignoreNotFound(err)
	}

	if o.Sandbox == nil {
		return "", fmt.Errorf("container %s already has this name and is not managed by cri-dockerd; remove it: %w",
			id, errdefs.ErrAlreadyExists)
	}

	sb, err := s.lockFoundSandbox(ctx, id)
	if err != nil {
		return "", err
	}
	defer sb.unlock()

	if s.isReady(sb.Sandbox) {
		return id, nil
	}

	return "", s.removeSandbox(ctx, sb)
}

// lockFoundSandbox locks a sandbox known to the engine, even if the view lacks it.
func (g *gate) lockFoundSandbox(ctx context.Context, id model.ContainerID) (*lockedSandbox, error) {
	if err := g.view.Refresh(ctx, id); err != nil {
		return nil, err
	}
	return g.lockSandbox(ctx, string(id))
}

// removeByName removes the sandbox or container with this name, if it is managed by this daemon. A
// container created by this call is removed by its ID: an inspect of it may be what failed.
func (s *Service) removeByName(ctx context.Context, name string, created model.ContainerID) error {
	id := created
	if created == "" {
		found, o, err := s.Engine.FindByName(ctx, name)
		switch {
		case err != nil:
			return ignoreNotFound(err)
		case o.Sandbox != nil:
			return s.removeByID(ctx, found)
		case o.Container == nil:
			return nil // not managed by this daemon
		}

		if err := s.View.Refresh(ctx, found); err != nil {
			return ignoreNotFound(err)
		}

		id = found
	}

	c, err := s.lockContainer(ctx, string(id))
	if errdefs.IsNotFound(err) && created != "" { // the view has not read it
		return errors.Join(ignoreNotFound(s.Engine.Remove(ctx, created)), s.PluginStore.Forget(created))
	}

	if err != nil {
		return ignoreNotFound(err)
	}
	defer c.unlock()

	return s.removeContainer(ctx, c)
}

// removeByID removes a sandbox, complete or not. It works without an inspect: the engine may hang
// on one while it starts the pause container.
func (s *Service) removeByID(ctx context.Context, id model.ContainerID) error {
	sb, err := s.lockSandbox(ctx, string(id))
	if err != nil {
		return err
	}
	defer sb.unlock()
	return s.removeSandbox(ctx, sb)
}
