package cri

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// Network namespaces of our own (design D4a): made before the pause, which joins its pod's while the network's plugins connect it.

// joinError is a sandbox that failed at what only a namespace of our own needs.
type joinError struct{ err error }

func (e *joinError) Error() string { return e.err.Error() }
func (e *joinError) Unwrap() error { return e.err }

// asJoinError marks an error of the engine when it was told of a namespace of ours: it may not see our mounts, or permit them.
func asJoinError(err error, netns string) error {
	if netns == "" || errdefs.IsAlreadyExists(err) || errdefs.IsConflict(err) || errdefs.IsNotFound(err) {
		return err
	}
	return &joinError{err}
}

const (
	joinDeadline = 5 * time.Second // the pause joins within microseconds of its start
	joinLook     = time.Millisecond
)

// ownNetNS says whether the network namespace of a pod is to be one of ours.
func (s *Service) ownNetNS(r *runtimeapi.RunPodSandboxRequest, host spec.Host) bool {
	if r.GetConfig().GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE || s.Network.Mode() != "none" {
		return false
	}
	if reason := spec.EngineNetNS(r, host); reason != "" {
		s.Log.Debug("the engine makes the pod's network namespace", "pod", spec.SandboxName(r.GetConfig().GetMetadata()), "reason", reason)
		return false
	}
	return s.joining.try(time.Now()) // last, since it may be this pod's turn to try
}

// makeSandbox makes a sandbox with a namespace of our own if that is possible, else with one of the engine's.
func (s *Service) makeSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest, host spec.Host) (model.ContainerID, error) {
	if !s.ownNetNS(r, host) {
		return s.makeSandboxIn(ctx, r, host, "")
	}
	id, err := s.makeSandboxInOwn(ctx, r, host)
	var join *joinError
	if err == nil {
		return id, nil
	}
	if !errors.As(err, &join) || ctx.Err() != nil || s.joining.isTrusted() {
		return "", err
	}
	id, again := s.makeSandboxIn(ctx, r, host, "")
	if again != nil {
		return "", again // it was not the namespace
	}
	pause := s.joining.fallBack(join.Error(), time.Now())
	s.Log.Warn("pods' network namespaces are the engine's for now", "reason", join, "until", pause)
	return id, nil
}

func (s *Service) makeSandboxInOwn(ctx context.Context, r *runtimeapi.RunPodSandboxRequest, host spec.Host) (model.ContainerID, error) {
	netns, err := s.Pins.Make(spec.NetSysctls(r.GetConfig()))
	if errdefs.IsInvalidArgument(err) {
		return "", fmt.Errorf("config.linux.sysctls: %w", err)
	} else if err != nil {
		return "", &joinError{err}
	}
	defer func() { // it is kept for the sandbox, if there is one
		if dropErr := s.Pins.Drop(netns); dropErr != nil {
			s.Log.Warn("a network namespace could not be dropped; the next start does", "err", dropErr)
		}
	}()
	return s.makeSandboxIn(ctx, r, host, netns)
}

// startJoined starts the pause and connects its pod meanwhile. It is ready when the pause has joined the namespace.
func (s *Service) startJoined(ctx context.Context, id model.ContainerID, cfg *runtimeapi.PodSandboxConfig, netns string) error {
	unlock, err := s.lockNetwork(ctx, id) // recovery must not take the network of a pause that does not run yet for a leftover
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := s.Pins.Keep(id, netns); err != nil {
		return err
	}
	p := s.podOf(&spec.Sandbox{ID: id, Metadata: cfg.GetMetadata(), Annotations: cfg.GetAnnotations()}, cfg)
	g, both := errgroup.WithContext(ctx)
	var ips []netip.Addr
	g.Go(func() (err error) {
		ips, err = s.Network.Add(both, p)
		return err
	})
	var sb *spec.Sandbox
	g.Go(func() (err error) {
		// An ADD that fails does not cut the start off, after which nobody would know whether the pause runs.
		if sb, err = s.startPause(ctx, id); err != nil {
			return asJoinError(err, netns)
		}
		return s.awaitJoined(ctx, sb)
	})
	if err := g.Wait(); err != nil {
		return err
	}
	if err := s.writeResolvConf(sb, cfg); err != nil {
		return err
	}
	if sb.HostsPath != "" { // Docker has copied the node's
		if err := s.writePodFile(sb.ID, sb.HostsPath, spec.Hosts(cfg.GetHostname(), ips)); err != nil {
			return fmt.Errorf("write the pod's hosts file: %w", err)
		}
	}
	s.joining.succeeded()
	return s.Network.Confirm(string(id))
}

// awaitJoined waits until a pause has joined its namespace.
func (s *Service) awaitJoined(ctx context.Context, sb *spec.Sandbox) error {
	tick := time.NewTicker(joinLook)
	defer tick.Stop()
	for deadline := time.Now().Add(s.joining.patience); !s.Pins.Joined(sb.ID, sb.Pid); {
		if time.Now().After(deadline) {
			return &joinError{fmt.Errorf("the pause process did not join the pod's network namespace within %v: %w", s.joining.patience, errdefs.ErrUnavailable)}
		}
		if now, err := s.View.Sandbox(string(sb.ID)); err == nil && !now.Running {
			return ended(now)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}

// ended is the error of a pause that ended at once. The embedded one says with its exit code what it could not do (engine/pause/src).
func ended(sb *spec.Sandbox) error {
	why := fmt.Sprintf("exit code %d", sb.ExitCode)
	switch {
	case !sb.OwnNetNS:
		return fmt.Errorf("the pause process ended at once (%s): %w", why, errdefs.ErrUnavailable)
	case sb.ExitCode == 200:
		why = "it could not give up its privileges"
	case sb.ExitCode > 100:
		why = "open its network namespace: " + syscall.Errno(sb.ExitCode-100).Error()
	case sb.ExitCode > 0:
		why = "setns: " + syscall.Errno(sb.ExitCode).Error()
	}
	return &joinError{fmt.Errorf("the pause process could not join the pod's network namespace (%s): %w", why, errdefs.ErrUnavailable)}
}
