package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// Locks. The key of a sandbox or container is its ID, which never changes; Docker's names do
// (docker rename). What is being created has no ID yet, so its name is locked until it has one. A
// call that needs several locks takes them in this order: name, sandbox, container, network, image
// volume.
//
// A call that changes something gets its record with the lock, so that it never acts on a record
// from before its wait. archtest has the files that may read records otherwise.

// lockedSandbox is a sandbox whose lock the call holds, with the record as it was read under it.
type lockedSandbox struct {
	*spec.Sandbox
	unlock func()
}

// lockedContainer is a container whose lock the call holds, with the record as it was read under
// it.
type lockedContainer struct {
	*spec.Container
	unlock func()
}

// isKnown says whether the view has the sandbox. Of any other there may be containers and a
// network.
func (sb *lockedSandbox) isKnown() bool { return isKnown(sb.Sandbox) }

func isKnown(sb *spec.Sandbox) bool { return sb.Name != "" }

// lockSandbox locks a sandbox by its ID or a unique prefix of one and reads its record. The record
// of one that the view does not have holds the ID alone. NotFound if no sandbox can have such an
// ID.
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
		sb = &spec.Sandbox{ID: full}
	}

	return &lockedSandbox{Sandbox: sb, unlock: unlock}, nil
}

// sandboxID is the full ID of a sandbox that the view has, or that may be left without its pause.
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

// lockContainer locks a container by its ID or a unique prefix of one and reads its record.
// NotFound if the view does not have it, before the wait or after.
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

// renew reads a locked container anew from the engine. On error the record is as it was.
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

// lockName locks the name of something that is being created.
func (g *gate) lockName(ctx context.Context, name string) (unlock func(), err error) {
	unlock, err = g.names.Lock(ctx, "name "+name)
	if err != nil {
		return nil, fmt.Errorf("wait for the name %s: %w", name, err)
	}
	return unlock, nil
}
