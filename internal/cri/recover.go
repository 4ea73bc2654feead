package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// Recover adopts the pods of older shims and clears what a crash left: networks and pins of sandboxes that are gone or do not run, and
// sandboxes of ours that were made and never started. What then belongs to no pod, the network's plugins collect. It never touches a pod that
// runs. It is called whenever the view has been read anew.
func (s *Service) Recover(ctx context.Context) error {
	host, err := s.host()
	if err != nil {
		return err
	}
	s.joining.retry()
	errs := []error{s.recoverForgotten(ctx), s.recoverImageVolumes(ctx, host), s.Pins.Sweep()}
	errs = append(errs, s.adoptAll(ctx)...) // first, lest the plugins collect what they have
	holders := s.Network.Attached()
	for _, id := range s.Pins.List() {
		holders = append(holders, string(id))
	}
	holders = append(holders, s.forgotten()...)
	slices.Sort(holders)
	errs = append(errs, s.recoverNetworks(ctx, slices.Compact(holders))...)
	errs = append(errs, s.recoverSandboxes(ctx)...)
	if err := s.Network.Collect(ctx); err != nil {
		s.Log.Warn("the network's plugins could not collect what belongs to no pod", "err", err)
	}
	return errors.Join(errs...)
}

// observeRemoval requests a recovery if the network of a removed sandbox is still held: somebody has
// removed the sandbox behind us (docker rm -f), and no call will name it again.
func (s *Service) observeRemoval(id model.ContainerID) {
	if s.holdsNetwork(id) {
		s.debts.signal()
	}
}

// recoverNetworks releases networks side by side: the plugins of one may be slow or hang.
func (s *Service) recoverNetworks(ctx context.Context, ids []string) []error {
	errs := make([]error, len(ids))
	var g errgroup.Group
	g.SetLimit(recoveriesAtOnce)
	for i, id := range ids {
		g.Go(func() error { errs[i] = s.recoverNetwork(ctx, model.ContainerID(id)); return nil })
	}
	_ = g.Wait()
	return errs
}

const (
	// recoveriesAtOnce is how many networks or sandboxes recovery handles side by side.
	recoveriesAtOnce = 8
	// recoverSandboxTimeout bounds the adoption or the removal of one sandbox. The release of its
	// network alone may take most of a minute.
	recoverSandboxTimeout = undoSandboxDeadline
)

// recoverNetwork releases a network whose sandbox is gone or does not run.
func (s *Service) recoverNetwork(ctx context.Context, id model.ContainerID) error {
	running := func() (*spec.Sandbox, bool) {
		sb, err := s.View.Sandbox(string(id))
		if err != nil {
			return &spec.Sandbox{ID: id}, false
		}
		return sb, sb.Running
	}
	if _, ok := running(); ok {
		return nil
	}
	wait, cancel := context.WithTimeout(ctx, recoveryWait)
	defer cancel()
	err := s.releases.join(wait, id, func(ctx context.Context) error {
		unlock, err := s.lockNetwork(ctx, id)
		if err != nil {
			return err
		}
		defer unlock()
		sb, ok := running() // asked again under the lock: the pod may have been being made
		if ok {
			return errInUse
		}
		if !s.holdsNetwork(id) {
			return nil
		}
		if gone, err := s.gone(ctx, sb); !gone {
			return err
		}
		s.Log.Info("releasing the network of a pod that is gone", "sandbox", id)
		return s.release(ctx, sb)
	})
	if err != nil && !errors.Is(err, errInUse) {
		return fmt.Errorf("recover sandbox %s: %w", id, err)
	}
	return nil
}

// gone says whether a sandbox that the view does not show as running holds its network for nobody. One that the view lacks may be there all the
// same: renamed by hand, or one that the engine could not describe. Then it is let alone.
func (s *Service) gone(ctx context.Context, sb *spec.Sandbox) (bool, error) {
	if isKnown(sb) {
		return true, nil
	}
	switch _, err := s.Engine.Inspect(ctx, sb.ID); {
	case errdefs.IsNotFound(err):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("recover sandbox %s: %w", sb.ID, err)
	}
	s.Log.Warn("a sandbox's container is none that can be managed, and keeps its network; remove it (docker rm -f) to release that", "sandbox", sb.ID)
	return false, nil
}

// forgotten are the sandboxes that an older shim has noted and whose container is gone.
func (s *Service) forgotten() []string {
	var ids []string
	for _, id := range s.Checkpoints.List() {
		if _, err := s.View.Sandbox(string(id)); err != nil {
			ids = append(ids, string(id))
		}
	}
	return ids
}

// recoverSandboxes removes sandboxes side by side: the engine may hang on one.
func (s *Service) recoverSandboxes(ctx context.Context) []error {
	return s.eachSandbox(ctx, func(ctx context.Context, sb *spec.Sandbox) error {
		if err := s.recoverSandbox(ctx, sb); err != nil {
			return fmt.Errorf("recover sandbox %s: %w", sb.ID, err)
		}
		return nil
	})
}

// eachSandbox calls do for each sandbox of the view, side by side and each with its own deadline.
func (s *Service) eachSandbox(ctx context.Context, do func(context.Context, *spec.Sandbox) error) []error {
	sandboxes := s.View.Sandboxes()
	errs := make([]error, len(sandboxes))
	var g errgroup.Group
	g.SetLimit(recoveriesAtOnce)
	for i, sb := range sandboxes {
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

// recoverSandbox removes a sandbox that was made by us, never handed to the kubelet, and holds a name: one that never ran, or runs without its
// network. The kubelet starts such a pod anew. An older shim's is left to the kubelet, which sees that it has no address.
func (s *Service) recoverSandbox(ctx context.Context, sb *spec.Sandbox) error {
	halfMade := !sb.Running && sb.Pid == 0 && sb.StartedAt.IsZero() // created, failed to start, or dead before
	unconnected := sb.Running && !sb.HostNetwork() && s.Network.Mode() == "none" && sb.Namespaces != nil && !s.connected(sb) && len(s.View.ContainersOf(sb.ID)) == 0
	if sb.Foreign || sb.Stale || !halfMade && !unconnected {
		return nil
	}
	unlock, err := s.lockName(ctx, sb.Name) // it may be being made
	if err != nil {
		return err
	}
	defer unlock()
	now, err := s.lockSandbox(ctx, string(sb.ID))
	if err != nil {
		return notFoundIsFine(err)
	}
	defer now.unlock()

	if !now.isKnown() || halfMade && now.Running || unconnected && s.connected(now.Sandbox) {
		return nil
	}
	s.Log.Info("removing a sandbox that was never finished", "sandbox", sb.ID, "name", sb.Name)
	return s.removeSandbox(ctx, now)
}
