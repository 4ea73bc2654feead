package podnet

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/model"
)

const (
	// maxConcurrentReclaims is the number of concurrent releases of Reclaim.
	maxConcurrentReclaims = 8
	// reclaimTimeout limits how long Reclaim waits for one pod before it continues with the next.
	reclaimTimeout = 30 * time.Second
)

// IsAdoptable reports whether a pod may have a network unknown to this Manager: the engine created
// its namespace, and an older shim connected it, or this program before a hand-back of the node.
func (m *Manager) IsAdoptable(sb *model.Sandbox) bool {
	if !m.ConnectsPods() || !isAdoptable(sb) {
		return false
	}
	return m.pins.Path(sb.ID) == "" || !slices.Contains(m.connector.Attached(), string(sb.ID))
}

func isAdoptable(sb *model.Sandbox) bool { return sb.Running && !sb.Stale && sb.IsWithoutNetwork() }

// Adopt takes over the network of an adoptable pod. It pins the namespace, so that the network can
// be released after the pause process has exited. The pod is not disturbed.
func (m *Manager) Adopt(ctx context.Context, sb *model.Sandbox) error {
	unlock, err := m.lock(ctx, sb.ID)
	if err != nil {
		return err
	}
	defer unlock()

	if !m.ConnectsPods() || !isAdoptable(sb) { // the pod was stopped meanwhile
		return nil
	}

	m.connector.Adopt(string(sb.ID))
	if sb.Restarted { // its current namespace is not the connected one
		return nil
	}
	if _, err := m.pins.Pin(sb.ID, sb.Pid); err != nil {
		return err
	}

	if sb.Foreign {
		m.log.Info("adopted a pod of an older shim", "sandbox", sb.ID, "name", sb.Name, "addresses", m.Addresses(sb))
	}

	return nil
}

// Sandboxes provides the state of sandboxes to Reclaim.
type Sandboxes interface {
	// Sandbox returns the record of a sandbox, NotFound if it is unknown.
	Sandbox(id string) (*model.Sandbox, error)
	// IsRemoved reports whether a stopped sandbox no longer needs its network.
	IsRemoved(ctx context.Context, id model.ContainerID) (bool, error)
}

// Reclaim releases the networks of removed or stopped sandboxes. It releases several at once,
// because plugins may be slow or hang. It also drops namespaces of earlier processes. It never
// touches a running pod.
func (m *Manager) Reclaim(ctx context.Context, all Sandboxes) error {
	swept := m.namespaces.Sweep() // first, because it runs no plugins
	ids := m.pins.List()
	for _, id := range m.Attached() {
		ids = append(ids, model.ContainerID(id))
	}

	for _, id := range m.checkpoints.List() {
		if _, err := all.Sandbox(string(id)); err != nil {
			ids = append(ids, id)
		}
	}

	slices.Sort(ids)
	ids = slices.Compact(ids)

	errs := make([]error, len(ids))
	var g errgroup.Group
	g.SetLimit(maxConcurrentReclaims)
	for i, id := range ids {
		g.Go(func() error { errs[i] = m.ReclaimOne(ctx, id, all); return nil })
	}

	_ = g.Wait()

	return errors.Join(append(errs, swept)...)
}

// ReclaimOne is Reclaim for one sandbox.
func (m *Manager) ReclaimOne(ctx context.Context, id model.ContainerID, all Sandboxes) error {
	find := func() *model.Sandbox {
		sb, err := all.Sandbox(string(id))
		if err != nil {
			return &model.Sandbox{ID: id}
		}
		return sb
	}
	if find().Running {
		return nil
	}

	wait, cancel := context.WithTimeout(ctx, reclaimTimeout)
	defer cancel()

	err := m.releases.join(wait, id, byReclaim, func(ctx context.Context) error {
		unlock, err := m.lock(ctx, id)
		if err != nil {
			return err
		}
		defer unlock()

		sb := find() // again under the lock, since the pod may have been started
		if sb.Running || !m.Holds(id) {
			return nil
		}
		if isRemoved, err := all.IsRemoved(ctx, id); !isRemoved {
			return err
		}

		m.log.Info("releasing the network of a removed or ended pod", "sandbox", id)

		return m.releaseLocked(ctx, sb)
	})
	if err != nil {
		return fmt.Errorf("recover sandbox %s: %w", id, err)
	}

	return nil
}

// Collect asks the plugins to release resources without a pod.
func (m *Manager) Collect(ctx context.Context) error {
	if !m.ConnectsPods() {
		return nil
	}
	return m.connector.Collect(ctx)
}
