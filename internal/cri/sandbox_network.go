package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/spec"
)

// The pod's network: its namespace is pinned, so that it outlives the pause process, and connected. Here the engine made it with the pause;
// sandbox_netns.go is for those of our own.

// pod is a sandbox as the network needs to know it.
func (s *Service) pod(sb *spec.Sandbox) podnet.Pod {
	return podnet.Pod{
		ID: string(sb.ID), Name: sb.Metadata.GetName(), Namespace: sb.Metadata.GetNamespace(), UID: sb.Metadata.GetUid(),
		NetNS: s.Pins.Path(sb.ID), Annotations: sb.Annotations,
	}
}

// podOf is a sandbox that is to be connected as its configuration asks for.
func (s *Service) podOf(sb *spec.Sandbox, cfg *runtimeapi.PodSandboxConfig) podnet.Pod {
	p := s.pod(sb)
	p.Ports, p.DNS = cfg.GetPortMappings(), cfg.GetDnsConfig()
	p.CgroupParent = cfg.GetLinux().GetCgroupParent()
	return p
}

// connected says whether the pod has what connect gives.
func (s *Service) connected(sb *spec.Sandbox) bool {
	return s.Network.Mode() != "none" || len(s.addresses(sb)) > 0
}

// connect writes the pod's resolv.conf and connects the namespace that the engine made with the pause. Its undo is disconnect.
func (s *Service) connect(ctx context.Context, sb *spec.Sandbox, cfg *runtimeapi.PodSandboxConfig) error {
	if err := s.writeResolvConf(sb, cfg); err != nil {
		return err
	}
	if sb.HostNetwork() || s.Network.Mode() != "none" {
		return nil
	}
	if _, err := s.Pins.Pin(sb.ID, sb.Pid); err != nil {
		return err
	}
	if _, err := s.Network.Add(ctx, s.podOf(sb, cfg)); err != nil {
		return err
	}
	return s.Network.Confirm(string(sb.ID))
}

// writeResolvConf writes what the kubelet says of DNS, in place: the file is mounted in all of the pod's containers.
func (s *Service) writeResolvConf(sb *spec.Sandbox, cfg *runtimeapi.PodSandboxConfig) error {
	if cfg.GetDnsConfig() == nil || sb.ResolvConfPath == "" {
		return nil
	}
	if err := s.writePodFile(sb.ID, sb.ResolvConfPath, spec.ResolvConf(cfg.GetDnsConfig())); err != nil {
		return fmt.Errorf("write the pod's resolv.conf: %w", err)
	}
	return nil
}

// lockNetwork serialises what is done to one pod's network, also of a pod whose name nobody knows any more.
func (s *Service) lockNetwork(ctx context.Context, sandboxID model.ContainerID) (unlock func(), err error) {
	unlock, err = s.names.Lock(ctx, "network of "+string(sandboxID))
	if err != nil {
		return nil, fmt.Errorf("network of sandbox %s: %w", sandboxID, err)
	}
	return unlock, nil
}

// release is disconnect under its lock.
func (s *Service) release(ctx context.Context, sb *spec.Sandbox) error {
	p, connected := s.released(sb)
	if connected {
		if err := s.Network.Del(ctx, p); err != nil {
			return err
		}
	}
	s.debts.paid(string(sb.ID))
	return errors.Join(s.Pins.Unpin(sb.ID), s.Checkpoints.Remove(sb.ID))
}

// released is a sandbox as the network needs to know it to release it, with what an older shim has noted of it, and whether there is
// something to release.
func (s *Service) released(sb *spec.Sandbox) (p podnet.Pod, connected bool) {
	p = s.pod(sb)
	p.Foreign, p.Ports = sb.Foreign, sb.EnginePorts
	if p.NetNS == "" && sb.Pid != 0 && !sb.Restarted { // of an older shim's pod; the pause may be dead, and its number another's
		if pin, err := s.Pins.Pin(sb.ID, sb.Pid); err == nil {
			p.NetNS = pin
		}
	}
	c, err := s.Checkpoints.Read(sb.ID)
	switch {
	case err == nil:
		p.Ports = c.Ports
		if sb.Metadata == nil { // its container is gone
			p.Name, p.Namespace, p.Foreign = c.Name, c.Namespace, true
		}
	case errdefs.IsNotFound(err):
	default:
		p.Foreign = true
		s.Log.Warn("an older shim's note of a pod cannot be read; the pod's network is released without it", "sandbox", sb.ID, "err", err)
	}
	return p, !sb.HostNetwork() && !sb.EngineNetwork() && !c.HostNetwork
}

// holdsNetwork says whether something of a pod's network is left.
func (s *Service) holdsNetwork(id model.ContainerID) bool {
	_, err := s.Checkpoints.Read(id)
	return s.Pins.Path(id) != "" || slices.Contains(s.Network.Attached(), string(id)) || !errdefs.IsNotFound(err)
}

// Leftovers tells that Recover has something to do that it has not been told before.
func (s *Service) Leftovers() <-chan struct{} { return s.debts.wake }

// Owed is the number of pods whose network could not be released yet.
func (s *Service) Owed() int { return s.debts.count() }

// OpenNetNS opens a running sandbox's network namespace, nil for the host's. The namespace is the one that is pinned for the sandbox, or
// that of a process that is verified to be its pause. NotFound, or FailedPrecondition when the pod does not run.
func (s *Service) OpenNetNS(sandboxID string) (*os.File, error) {
	sb, err := s.View.Sandbox(sandboxID)
	switch {
	case err != nil:
		return nil, err
	case !sb.Ready():
		return nil, fmt.Errorf("sandbox %s is not ready: %w", sb.ID, errdefs.ErrFailedPrecondition)
	case sb.HostNetwork():
		return nil, nil
	}

	netns, err := s.Pins.OpenPin(sb.ID)
	if errdefs.IsNotFound(err) {
		return podnet.OpenProcess(sb.ID, sb.Pid)
	}
	return netns, err
}
