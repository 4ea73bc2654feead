package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/model"
)

const (
	// recoveriesAtOnce is the number of containers or sandboxes in recovery at the same time.
	recoveriesAtOnce = 8
	// recoveryWait bounds the recovery of one container.
	recoveryWait = 30 * time.Second
	// recoverSandboxTimeout bounds the adoption or removal of one sandbox. The release of its
	// network alone may take most of a minute.
	recoverSandboxTimeout = undoSandboxDeadline
)

// Recover adopts the pods of older shims and cleans up after a crash. It releases networks and pins
// of removed or stopped sandboxes, and removes sandboxes that this daemon created but never
// started. Finally it runs the plugins' garbage collection. It never touches a running pod. The
// daemon calls it after every full read of the view.
func (s *Service) Recover(ctx context.Context) error {
	host, err := s.host()
	if err != nil {
		return err
	}

	s.joining.retry()

	r := recovery{s}
	errs := []error{r.recoverForgotten(ctx), r.recoverUnfinished(ctx), s.volumes.restore(ctx, host),
		s.Accounts.RemoveReaders(ctx)}
	errs = append(errs, r.adoptAll(ctx)...) // before the plugins can collect their networks
	errs = append(errs, s.Reclaimer.Reclaim(ctx, r))
	errs = append(errs, r.recoverSandboxes(ctx)...)
	if err := s.Reclaimer.Collect(ctx); err != nil {
		s.Log.Warn("garbage collection of network plugins failed", "err", err)
	}

	return errors.Join(errs...)
}

// recovery cleans up leftovers. It implements podnet.Sandboxes.
type recovery struct{ *Service }

// observeRemoval releases the network of a removed sandbox if it still holds one. No later call
// will name it if someone else removed it (docker rm -f). A recovery would not do: it may be
// waiting for the plugins of other pods. It retries a failed release.
func (r recovery) observeRemoval(ctx context.Context, g *errgroup.Group, id model.ContainerID) {
	if !r.Node.Holds(id) {
		return
	}

	if !g.TryGo(func() error {
		if err := r.Reclaimer.ReclaimOne(ctx, id, r); err != nil {
			r.Log.Warn("failed to release the network of a removed pod; retrying", "sandbox", id, "err", err)
			r.Reclaimer.RequestReclaim()
		}
		return nil
	}) {
		r.Reclaimer.RequestReclaim()
	}
}

// forEachSandbox calls do for each sandbox in the view, several at once and each with its own
// deadline: the engine may hang on one.
func (r recovery) forEachSandbox(ctx context.Context, do func(context.Context, *model.Sandbox) error) []error {
	all := r.View.Sandboxes()
	errs := make([]error, len(all))
	var g errgroup.Group
	g.SetLimit(recoveriesAtOnce)
	for i, sb := range all {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, recoverSandboxTimeout)
			defer cancel()
			errs[i] = do(ctx, sb)
			return nil
		})
	}

	_ = g.Wait()

	return errs
}

// adoptAll adopts all pods with an unknown network.
func (r recovery) adoptAll(ctx context.Context) []error {
	return r.forEachSandbox(ctx, func(ctx context.Context, sb *model.Sandbox) error {
		if !r.Reclaimer.IsAdoptable(sb) {
			return nil
		}
		if err := r.adopt(ctx, sb); err != nil {
			return fmt.Errorf("adopt sandbox %s: %w", sb.ID, err)
		}
		return nil
	})
}

// adopt takes over the network of a pod created by an older shim, or handed back to one.
func (r recovery) adopt(ctx context.Context, sb *model.Sandbox) error {
	return r.withLocks(ctx, sb, func(now *lockedSandbox) error { return r.Reclaimer.Adopt(ctx, now.Sandbox) })
}

// withLocks calls do with the record of a sandbox under its locks, unless it was removed meanwhile.
func (r recovery) withLocks(ctx context.Context, sb *model.Sandbox, do func(now *lockedSandbox) error) error {
	unlock, err := r.lockName(ctx, sb.Name) // a call may still be creating it
	if err != nil {
		return err
	}
	defer unlock()

	now, err := r.lockSandbox(ctx, string(sb.ID))
	if err != nil {
		return ignoreNotFound(err)
	}
	defer now.unlock()

	return do(now)
}

// Sandbox implements podnet.Sandboxes.
func (r recovery) Sandbox(id string) (*model.Sandbox, error) { return r.View.Sandbox(id) }

// IsRemoved implements podnet.Sandboxes. A sandbox missing from the view may still exist, for
// example renamed by hand or not readable from the engine. It keeps its network.
func (r recovery) IsRemoved(ctx context.Context, id model.ContainerID) (bool, error) {
	if _, err := r.View.Sandbox(string(id)); err == nil {
		return true, nil
	}

	switch _, err := r.Engine.Inspect(ctx, id); {
	case errdefs.IsNotFound(err):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("recover sandbox %s: %w", id, err)
	}

	r.Log.Warn("the container of a sandbox cannot be managed and keeps its network; "+
		"remove it (docker rm -f) to release the network", "sandbox", id)

	return false, nil
}

// recoverSandboxes removes all incomplete sandboxes.
func (r recovery) recoverSandboxes(ctx context.Context) []error {
	return r.forEachSandbox(ctx, func(ctx context.Context, sb *model.Sandbox) error {
		if err := r.recoverSandbox(ctx, sb); err != nil {
			return fmt.Errorf("recover sandbox %s: %w", sb.ID, err)
		}
		return nil
	})
}

// recoverSandbox removes an incomplete sandbox of this daemon, since it occupies a name. Such a
// sandbox was never started, or runs without its network. The kubelet never got its ID and starts
// the pod again. Sandboxes of an older shim stay: the kubelet sees that they have no address.
func (r recovery) recoverSandbox(ctx context.Context, sb *model.Sandbox) error {
	incomplete := !sb.Running && sb.Pid == 0 && sb.StartedAt.IsZero() // created, failed to start, or dead
	unconnected := sb.Running && sb.Namespaces != nil && !r.Network.IsConnected(sb) &&
		len(r.View.ContainersOf(sb.ID)) == 0
	unfinished := r.Concealer.IsConcealed(sb.ID) // of NRI plugins
	if sb.Foreign || sb.Stale || !incomplete && !unconnected && !unfinished {
		return nil
	}

	return r.withLocks(ctx, sb, func(now *lockedSandbox) error {
		if !now.isKnown() || incomplete && now.Running || unconnected && r.Network.IsConnected(now.Sandbox) {
			return nil
		}
		if unfinished && !r.Concealer.IsConcealed(sb.ID) {
			return nil
		}
		r.Log.Info("removing an incomplete sandbox", "sandbox", sb.ID, "name", sb.Name)
		return r.removeSandbox(ctx, now)
	})
}
