package podnet

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

const (
	// reclaimsAtOnce is the number of networks that Reclaim releases at once.
	reclaimsAtOnce = 8
	// reclaimWait is how long Reclaim waits for one pod before it goes on with the next.
	reclaimWait = 30 * time.Second
)

// IsAdoptable reports whether a pod may have a network that is not known here: the engine has made
// its namespace, and an older shim has connected it, or this program before the node was handed
// back.
func (m *Manager) IsAdoptable(sb *spec.Sandbox) bool {
	if !m.ConnectsPods() || !isAdoptable(sb) {
		return false
	}
	return m.pins.Path(sb.ID) == "" || !slices.Contains(m.connector.Attached(), string(sb.ID))
}

func isAdoptable(sb *spec.Sandbox) bool { return sb.Running && !sb.Stale && sb.IsWithoutNetwork() }

// Adopt takes over the network of a pod if it is adoptable. Its namespace is pinned, so that it can
// be released when its pause is dead. The pod does not notice.
func (m *Manager) Adopt(ctx context.Context, sb *spec.Sandbox) error {
	unlock, err := m.lock(ctx, sb.ID)
	if err != nil {
		return err
	}
	defer unlock()

	if !m.ConnectsPods() || !isAdoptable(sb) { // it was stopped meanwhile
		return nil
	}

	m.connector.Adopt(string(sb.ID))
	if sb.Restarted { // its namespace is not the one that was connected
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

// Sandboxes are what Reclaim needs to know of sandboxes.
type Sandboxes interface {
	// Sandbox returns the record of a sandbox, NotFound if it is not known.
	Sandbox(id string) (*spec.Sandbox, error)
	// IsRemoved reports whether a sandbox that does not run needs its network no longer.
	IsRemoved(ctx context.Context, id model.ContainerID) (bool, error)
}

// Reclaim releases the networks of sandboxes that are removed or do not run, several at once: the
// plugins of one may be slow or hang. It drops the namespaces that earlier processes left. It never
// touches a pod that runs.
func (m *Manager) Reclaim(ctx context.Context, all Sandboxes) error {
	swept := m.namespaces.Sweep() // first: it waits for no plugin
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
	g.SetLimit(reclaimsAtOnce)
	for i, id := range ids {
		g.Go(func() error { errs[i] = m.reclaim(ctx, id, all); return nil })
	}

	_ = g.Wait()

	return errors.Join(append(errs, swept)...)
}

// reclaim releases the network of one sandbox.
func (m *Manager) reclaim(ctx context.Context, id model.ContainerID, all Sandboxes) error {
	find := func() *spec.Sandbox {
		sb, err := all.Sandbox(string(id))
		if err != nil {
			return &spec.Sandbox{ID: id}
		}
		return sb
	}
	if find().Running {
		return nil
	}

	wait, cancel := context.WithTimeout(ctx, reclaimWait)
	defer cancel()

	err := m.releases.join(wait, id, func(ctx context.Context) error {
		unlock, err := m.lock(ctx, id)
		if err != nil {
			return err
		}
		defer unlock()

		sb := find() // again under the lock: the pod may just have been started
		if sb.Running {
			return errInUse
		}
		if !m.Holds(id) {
			return nil
		}
		if isRemoved, err := all.IsRemoved(ctx, id); !isRemoved {
			return err
		}

		m.log.Info("releasing the network of a pod that is gone", "sandbox", id)

		return m.release(ctx, sb)
	})
	if err != nil && !errors.Is(err, errInUse) {
		return fmt.Errorf("recover sandbox %s: %w", id, err)
	}

	return nil
}

// Collect has the plugins release what belongs to no pod.
func (m *Manager) Collect(ctx context.Context) error {
	if !m.ConnectsPods() {
		return nil
	}
	return m.connector.Collect(ctx)
}
