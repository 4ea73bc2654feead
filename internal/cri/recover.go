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

// Recover adopts the pods of older shims and clears what a crash left: networks and pins of sandboxes
// that are removed or do not run, and sandboxes of ours that were created and never started. Then the
// network's plugins collect what belongs to no pod. It never touches a pod that runs. It is called
// whenever the view has been read anew.
func (s *Service) Recover(ctx context.Context) error {
	host, err := s.host()
	if err != nil {
		return err
	}
	s.joining.retry()
	errs := []error{s.recoverForgotten(ctx), s.recoverImageVolumes(ctx, host)}
	errs = append(errs, s.adoptAll(ctx)...) // first, lest the plugins collect what they have
	errs = append(errs, s.Reclaimer.Reclaim(ctx, sandboxes{s}))
	errs = append(errs, s.recoverSandboxes(ctx)...)
	if err := s.Reclaimer.Collect(ctx); err != nil {
		s.Log.Warn("the network's plugins could not collect what belongs to no pod", "err", err)
	}
	return errors.Join(errs...)
}

// observeRemoval requests a recovery if the network of a removed sandbox is still held: somebody has
// removed the sandbox behind us (docker rm -f), and no call will name it again.
func (s *Service) observeRemoval(id model.ContainerID) {
	if s.Node.Holds(id) {
		s.Reclaimer.RequestReclaim()
	}
}

// eachSandbox calls do for each sandbox of the view, several at once and each with its own deadline: the
// engine may hang on one.
func (s *Service) eachSandbox(ctx context.Context, do func(context.Context, *spec.Sandbox) error) []error {
	all := s.View.Sandboxes()
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
func (s *Service) adoptAll(ctx context.Context) []error {
	return s.eachSandbox(ctx, func(ctx context.Context, sb *spec.Sandbox) error {
		if !s.Reclaimer.IsAdoptable(sb) {
			return nil
		}
		if err := s.adopt(ctx, sb); err != nil {
			return fmt.Errorf("adopt sandbox %s: %w", sb.ID, err)
		}
		return nil
	})
}

// adopt takes over the network of a pod of an older shim, or of one of ours that was handed back to it.
func (s *Service) adopt(ctx context.Context, sb *spec.Sandbox) error {
	unlock, err := s.lockName(ctx, sb.Name) // it may just be being created
	if err != nil {
		return err
	}
	defer unlock()
	now, err := s.lockSandbox(ctx, string(sb.ID))
	if err != nil {
		return notFoundIsFine(err)
	}
	defer now.unlock()
	return s.Reclaimer.Adopt(ctx, now.Sandbox)
}

// sandboxes are the sandboxes of a service, as the network needs them to reclaim what is left.
type sandboxes struct{ s *Service }

// Sandbox implements podnet.Sandboxes.
func (x sandboxes) Sandbox(id string) (*spec.Sandbox, error) { return x.s.View.Sandbox(id) }

// IsRemoved implements podnet.Sandboxes. A sandbox that the view lacks may exist all the same: renamed
// by hand, or one that the engine could not describe. It keeps its network.
func (x sandboxes) IsRemoved(ctx context.Context, id model.ContainerID) (bool, error) {
	if _, err := x.s.View.Sandbox(string(id)); err == nil {
		return true, nil
	}
	switch _, err := x.s.Engine.Inspect(ctx, id); {
	case errdefs.IsNotFound(err):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("recover sandbox %s: %w", id, err)
	}
	x.s.Log.Warn("a sandbox's container is none that can be managed, and keeps its network; "+
		"remove it (docker rm -f) to release that", "sandbox", id)
	return false, nil
}

// recoverSandboxes removes the sandboxes that were never finished.
func (s *Service) recoverSandboxes(ctx context.Context) []error {
	return s.eachSandbox(ctx, func(ctx context.Context, sb *spec.Sandbox) error {
		if err := s.recoverSandbox(ctx, sb); err != nil {
			return fmt.Errorf("recover sandbox %s: %w", sb.ID, err)
		}
		return nil
	})
}

// recoverSandbox removes a sandbox of ours that was never handed to the kubelet and holds a name: one
// that never ran, or runs without its network. The kubelet starts such a pod anew. An older shim's is
// left to the kubelet, which sees that it has no address.
func (s *Service) recoverSandbox(ctx context.Context, sb *spec.Sandbox) error {
	halfMade := !sb.Running && sb.Pid == 0 && sb.StartedAt.IsZero() // created, failed to start, or dead before
	unconnected := sb.Running && sb.Namespaces != nil && !s.Network.IsConnected(sb) && len(s.View.ContainersOf(sb.ID)) == 0
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

	if !now.isKnown() || halfMade && now.Running || unconnected && s.Network.IsConnected(now.Sandbox) {
		return nil
	}
	s.Log.Info("removing a sandbox that was never finished", "sandbox", sb.ID, "name", sb.Name)
	return s.removeSandbox(ctx, now)
}
