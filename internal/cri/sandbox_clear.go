package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

const (
	// before the second try of an undo, five times as much before the third
	undoPause = 100 * time.Millisecond
	undoTries = 3
	// a try that took longer has waited for what does not answer, and is not repeated
	quickFailed = 10 * time.Second
)

// undoSandbox removes what a failed call has created. It repeats what fails quickly: a plugin whose
// ADD was cut off may fail at the first DEL and succeed at the second. The bridge plugin, for one,
// fails at a rule that was never made, and does not look for rules once the interface is removed.
func (s *Service) undoSandbox(ctx context.Context, name string, created model.ContainerID) error {
	remove := func() error {
		if created == "" { // a create that was cancelled or lost its answer may have happened
			return s.removeByName(ctx, name)
		}
		// also what is left if somebody has removed the pause meanwhile
		return s.removeByID(ctx, created)
	}

	pause := undoPause
	for try := 1; ; try++ {
		began := time.Now()
		err := remove()
		if err == nil || try == undoTries || time.Since(began) > quickFailed {
			return err
		}

		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}

		pause *= 5
	}
}

// clearSandbox removes what an earlier attempt left under a name. The same pod is returned if it is
// ready. AlreadyExists if the name is not a pod's of ours.
func (s *Service) clearSandbox(ctx context.Context, name string) (ready model.ContainerID, err error) {
	id, o, err := s.Engine.FindByName(ctx, name)
	if err != nil {
		return "", notFoundIsFine(err)
	}

	if o.Sandbox == nil {
		return "", fmt.Errorf("container %s has the name and is not ours; remove it: %w", id, errdefs.ErrAlreadyExists)
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

// lockFoundSandbox locks a sandbox that the engine has, whether or not the view knows it yet.
func (g *gate) lockFoundSandbox(ctx context.Context, id model.ContainerID) (*lockedSandbox, error) {
	if err := g.view.Refresh(ctx, id); err != nil {
		return nil, err
	}
	return g.lockSandbox(ctx, string(id))
}

// removeByName removes what of ours has this name, if there is something.
func (s *Service) removeByName(ctx context.Context, name string) error {
	id, o, err := s.Engine.FindByName(ctx, name)
	switch {
	case err != nil:
		return notFoundIsFine(err)
	case o.Sandbox != nil:
		return s.removeByID(ctx, id)
	case o.Container != nil:
		c, err := s.lockFoundContainer(ctx, id)
		if err != nil {
			return notFoundIsFine(err)
		}
		defer c.unlock()
		return s.removeContainer(ctx, c)
	}

	return nil // somebody else's
}

// removeByID removes a sandbox, or what is left of one. It needs no inspect: the engine may
// hang on that while it starts the pause.
func (s *Service) removeByID(ctx context.Context, id model.ContainerID) error {
	sb, err := s.lockSandbox(ctx, string(id))
	if err != nil {
		return err
	}
	defer sb.unlock()
	return s.removeSandbox(ctx, sb)
}
