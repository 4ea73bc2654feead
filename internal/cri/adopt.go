package cri

import (
	"context"
	"fmt"
	"slices"

	"cri-dockerd/internal/spec"
)

// adoptAll makes the running pods of older shims ours, as far as names and labels have not done so already.
func (s *Service) adoptAll(ctx context.Context) []error {
	if s.Network.Mode() != "none" {
		return nil
	}
	attached := s.Network.Attached()
	return s.eachSandbox(ctx, func(ctx context.Context, sb *spec.Sandbox) error {
		if !adoptable(sb) || s.Pins.Path(sb.ID) != "" && slices.Contains(attached, string(sb.ID)) {
			return nil
		}
		if err := s.adopt(ctx, sb); err != nil {
			return fmt.Errorf("adopt sandbox %s: %w", sb.ID, err)
		}
		return nil
	})
}

// adoptable says whether a pod may have a network that we do not know of: the engine has made its namespace, and somebody has connected it,
// an older shim or, before a node was handed back to one, we ourselves.
func adoptable(sb *spec.Sandbox) bool {
	return sb.Running && !sb.Stale && sb.NetworkMode == "none"
}

// adopt pins a pod's network namespace, so that it can be released when its pause is dead, and tells the network of it. Nothing that runs
// notices.
func (s *Service) adopt(ctx context.Context, sb *spec.Sandbox) error {
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
	unlockNetwork, err := s.lockNetwork(ctx, sb.ID)
	if err != nil {
		return err
	}
	defer unlockNetwork()

	sb = now.Sandbox
	if !adoptable(sb) { // it was stopped meanwhile
		return nil
	}
	s.Network.Adopt(string(sb.ID))
	if sb.Restarted { // its namespace is not the one that was connected
		return nil
	}
	if _, err := s.Pins.Pin(sb.ID, sb.Pid); err != nil {
		return err
	}
	if sb.Foreign {
		s.Log.Info("adopted a pod of an older shim", "sandbox", sb.ID, "name", sb.Name, "addresses", s.addresses(sb))
	}
	return nil
}
