package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/spec"
)

// PodSandboxStatus describes one sandbox with its containers, from memory (CRI PodSandboxStatus); the timestamp orders it among the events of
// GetContainerEvents, so that the kubelet keeps what is newer. The verbose answer also tells what the network's plugins find (CNI CHECK). NotFound for an unknown ID.
func (s *Service) PodSandboxStatus(ctx context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}
	pod, err := s.View.Pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	sb := pod.Sandbox
	resp := &runtimeapi.PodSandboxStatusResponse{Status: sb.Status(s.addresses(sb)), ContainersStatuses: statuses(pod.Containers), Timestamp: pod.At.UnixNano()}
	if r.GetVerbose() {
		resp.Info, err = verbose(map[string]any{"pid": sb.Pid, "netns": s.Pins.Path(sb.ID), "name": sb.Name, "pod": sb.Own, "network": s.checkNetwork(ctx, sb)})
	}
	return resp, err
}

func statuses(containers []*spec.Container) []*runtimeapi.ContainerStatus {
	var out []*runtimeapi.ContainerStatus
	for _, c := range containers {
		out = append(out, c.Status())
	}
	return out
}

// checkNetwork is what the network's plugins find when they look at a pod's connection, "ok" if it is as they made it, "" if it has none.
func (s *Service) checkNetwork(ctx context.Context, sb *spec.Sandbox) string {
	if !sb.Running || sb.HostNetwork() || s.Network.IPs(string(sb.ID)) == nil {
		return ""
	}
	if err := s.Network.Check(ctx, s.pod(sb)); err != nil {
		return err.Error()
	}
	return "ok"
}

// addresses are a pod's, none on the host network. Where libcni's cache does not know those of an older shim's pod, the pod itself does.
func (s *Service) addresses(sb *spec.Sandbox) []netip.Addr {
	if sb.HostNetwork() {
		return nil
	}
	if ips := s.Network.IPs(string(sb.ID)); ips != nil {
		return ips
	}
	if sb.Foreign && sb.Running && sb.NetworkMode == "none" {
		return s.Pins.Addresses(sb.ID, sb.Pid)
	}
	return sb.EngineIPs
}

// verbose is the info map of a verbose answer: one key with JSON, as crictl shows it.
func verbose(v any) (map[string]string, error) {
	b, err := json.Marshal(v)
	if len(b) > maxInfo {
		b, err = json.Marshal(map[string]string{"leftOut": fmt.Sprintf("%d bytes; at most %d are shown", len(b), maxInfo)})
	}
	return map[string]string{"info": string(b)}, err
}
