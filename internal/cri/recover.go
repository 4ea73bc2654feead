package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

const (
	// recoveriesAtOnce is the number of containers or sandboxes that recovery handles at once.
	recoveriesAtOnce = 8
	// recoveryWait is how long recovery waits for one container before it goes on with the next.
	recoveryWait = 30 * time.Second
	// recoverSandboxTimeout bounds the adoption or the removal of one sandbox. The release of its
	// network alone may take most of a minute.
	recoverSandboxTimeout = undoSandboxDeadline
)

// Recover adopts the pods of older shims and clears what a crash left: networks and pins of
// sandboxes that are removed or do not run, and sandboxes of ours that were created and never
// started. Then the network's plugins collect what belongs to no pod. It never touches a pod that
// runs. It is called whenever the view has been read anew.
func (s *Service) Recover(ctx context.Context) error {
	host, err := s.host()
	if err != nil {
		return err
	}

	s.joining.retry()

	r := recovery{s}
	errs := []error{r.recoverForgotten(ctx), s.volumes.restore(ctx, host)}
	errs = append(errs, r.adoptAll(ctx)...) // first, lest the plugins collect what they have
	errs = append(errs, s.Reclaimer.Reclaim(ctx, r))
	errs = append(errs, r.recoverSandboxes(ctx)...)
	if err := s.Reclaimer.Collect(ctx); err != nil {
		s.Log.Warn("the network's plugins could not collect what belongs to no pod", "err", err)
	}

	return errors.Join(errs...)
}

// recovery clears what is left. It implements podnet.Sandboxes.
type recovery struct{ *Service }

// observeRemoval requests a recovery if the network of a removed sandbox is still held: somebody
// has removed the sandbox behind us (docker rm -f), and no call will name it again.
func (r recovery) observeRemoval(id model.ContainerID) {
	if r.Node.Holds(id) {
		r.Reclaimer.RequestReclaim()
	}
}

// eachSandbox calls do for each sandbox of the view, several at once and each with its own
// deadline: the engine may hang on one.
func (r recovery) eachSandbox(ctx context.Context, do func(context.Context, *spec.Sandbox) error) []error {
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

// adoptAll adopts the pods whose network is not known here.
func (r recovery) adoptAll(ctx context.Context) []error {
	return r.eachSandbox(ctx, func(ctx context.Context, sb *spec.Sandbox) error {
		if !r.Reclaimer.IsAdoptable(sb) {
			return nil
		}
		if err := r.adopt(ctx, sb); err != nil {
			return fmt.Errorf("adopt sandbox %s: %w", sb.ID, err)
		}
		return nil
	})
}

// adopt takes over the network of a pod of an older shim, or of one of ours that was handed back to
// it.
func (r recovery) adopt(ctx context.Context, sb *spec.Sandbox) error {
	return r.locked(ctx, sb, func(now *lockedSandbox) error { return r.Reclaimer.Adopt(ctx, now.Sandbox) })
}

// locked calls do with the record of a sandbox under its locks, unless it was removed meanwhile.
func (r recovery) locked(ctx context.Context, sb *spec.Sandbox, do func(now *lockedSandbox) error) error {
	unlock, err := r.lockName(ctx, sb.Name) // it may just be being created
	if err != nil {
		return err
	}
	defer unlock()

	now, err := r.lockSandbox(ctx, string(sb.ID))
	if err != nil {
		return notFoundIsFine(err)
	}
	defer now.unlock()

	return do(now)
}

// Sandbox implements podnet.Sandboxes.
func (r recovery) Sandbox(id string) (*spec.Sandbox, error) { return r.View.Sandbox(id) }

// IsRemoved implements podnet.Sandboxes. A sandbox that the view lacks may exist all the same:
// renamed by hand, or one that the engine could not describe. It keeps its network.
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

	r.Log.Warn("a sandbox's container is none that can be managed, and keeps its network; "+
		"remove it (docker rm -f) to release that", "sandbox", id)

	return false, nil
}

// recoverSandboxes removes the sandboxes that were never finished.
func (r recovery) recoverSandboxes(ctx context.Context) []error {
	return r.eachSandbox(ctx, func(ctx context.Context, sb *spec.Sandbox) error {
		if err := r.recoverSandbox(ctx, sb); err != nil {
			return fmt.Errorf("recover sandbox %s: %w", sb.ID, err)
		}
		return nil
	})
}

// recoverSandbox removes a sandbox of ours that was never handed to the kubelet and holds a name:
// one that never ran, or runs without its network. The kubelet starts such a pod anew. An older
// shim's is left to the kubelet, which sees that it has no address.
func (r recovery) recoverSandbox(ctx context.Context, sb *spec.Sandbox) error {
	halfMade := !sb.Running && sb.Pid == 0 && sb.StartedAt.IsZero() // created, failed to start, or dead before
	unconnected := sb.Running && sb.Namespaces != nil && !r.Network.IsConnected(sb) &&
		len(r.View.ContainersOf(sb.ID)) == 0
	if sb.Foreign || sb.Stale || !halfMade && !unconnected {
		return nil
	}

	return r.locked(ctx, sb, func(now *lockedSandbox) error {
		if !now.isKnown() || halfMade && now.Running || unconnected && r.Network.IsConnected(now.Sandbox) {
			return nil
		}
		r.Log.Info("removing a sandbox that was never finished", "sandbox", sb.ID, "name", sb.Name)
		return r.removeSandbox(ctx, now)
	})
}
