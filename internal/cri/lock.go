package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// Locks. Sandboxes and containers are locked by ID, since Docker's names may change (docker
// rename). An object that is being created has no ID yet; its name is locked until then. A call
// with several locks takes them in this order: name, sandbox, container, network, image volume.
//
// A call with side effects reads its record under the lock, so it never acts on a record from
// before its wait. archtest lists the files allowed to read records otherwise.

// lockedSandbox is a locked sandbox with its record as read under the lock.
type lockedSandbox struct {
	*model.Sandbox
	unlock func()
}

// lockedContainer is a locked container with its record as read under the lock.
type lockedContainer struct {
	*model.Container
	unlock func()
}

// isKnown reports whether the view has the sandbox. Even an unknown sandbox may have containers and
// a network.
func (sb *lockedSandbox) isKnown() bool { return isKnown(sb.Sandbox) }

func isKnown(sb *model.Sandbox) bool { return sb.Name != "" }

// lockSandbox locks a sandbox by its ID or a unique prefix and reads its record. If the view lacks
// the sandbox, the record contains only the ID. NotFound if id is no valid sandbox ID.
func (g *gate) lockSandbox(ctx context.Context, id string) (*lockedSandbox, error) {
	full, err := g.sandboxID(id)
	if err != nil {
		return nil, err
	}

	unlock, err := g.names.Lock(ctx, "sandbox "+string(full))
	if err != nil {
		return nil, fmt.Errorf("wait for sandbox %s: %w", full, err)
	}

	sb, err := g.view.Sandbox(string(full))
	if err != nil {
		sb = &model.Sandbox{ID: full}
	}

	return &lockedSandbox{Sandbox: sb, unlock: unlock}, nil
}

// sandboxID returns the full ID of a sandbox. The view may lack it: its pause container may be
// removed.
func (g *gate) sandboxID(id string) (model.ContainerID, error) {
	sb, err := g.view.Sandbox(id)
	switch {
	case err == nil:
		return sb.ID, nil
	case !errdefs.IsNotFound(err):
		return "", err
	}

	full, parseErr := model.ParseContainerID(id)
	if parseErr != nil {
		return "", err
	}

	return full, nil
}

// lockContainer locks a container by its ID or a unique prefix and reads its record. NotFound if
// the view lacks it, before the wait or after.
func (g *gate) lockContainer(ctx context.Context, id string) (*lockedContainer, error) {
	c, err := g.view.Container(id)
	if err != nil {
		return nil, err
	}

	unlock, err := g.names.Lock(ctx, "container "+string(c.ID))
	if err != nil {
		return nil, fmt.Errorf("wait for container %s: %w", c.ID, err)
	}

	if c, err = g.view.Container(string(c.ID)); err != nil {
		unlock()
		return nil, err
	}

	return &lockedContainer{Container: c, unlock: unlock}, nil
}

// renew reads a locked container from the engine again. On error it keeps the record.
func (g *gate) renew(ctx context.Context, c *lockedContainer) error {
	if err := g.view.Refresh(ctx, c.ID); err != nil {
		return err
	}

	now, err := g.view.Container(string(c.ID))
	if err != nil {
		return err
	}

	c.Container = now

	return nil
}

// lockName locks the name of an object that is being created.
func (g *gate) lockName(ctx context.Context, name string) (unlock func(), err error) {
	unlock, err = g.names.Lock(ctx, "name "+name)
	if err != nil {
		return nil, fmt.Errorf("wait for name %s: %w", name, err)
	}
	return unlock, nil
}
