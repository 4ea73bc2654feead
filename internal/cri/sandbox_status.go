package cri

import (
	"context"
	"encoding/json"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// PodSandboxStatus describes one sandbox with its containers from memory (CRI PodSandboxStatus).
// The timestamp orders it among the events of GetContainerEvents, so that the kubelet keeps the
// newer state. The verbose response includes the plugins' check of the network (CNI CHECK).
// NotFound for an unknown ID.
func (s *Service) PodSandboxStatus(
	ctx context.Context, r *runtimeapi.PodSandboxStatusRequest,
) (*runtimeapi.PodSandboxStatusResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	pod, err := s.View.Pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}

	sb := pod.Sandbox
	resp := &runtimeapi.PodSandboxStatusResponse{
		Status:             sb.Status(s.Network.Addresses(sb)),
		ContainersStatuses: containerStatuses(pod.Containers, s.Engine),
		Timestamp:          pod.At.UnixNano(),
	}
	if r.GetVerbose() {
		netns, network := s.Node.Check(ctx, sb)
		resp.Info, err = verboseInfo(map[string]any{
			"pid":     sb.Pid,
			"netns":   netns,
			"name":    sb.Name,
			"pod":     sb.Own,
			"network": network,
		})
	}

	return resp, err
}

// containerStatuses describes containers like ContainerStatus.
func containerStatuses(containers []*model.Container, e Engine) []*runtimeapi.ContainerStatus {
	var out []*runtimeapi.ContainerStatus
	for _, c := range containers {
		out = append(out, e.Measure(c).Status())
	}
	return out
}

// verboseInfo returns the info map of a verbose response: one key with JSON, as expected by crictl.
func verboseInfo(v any) (map[string]string, error) {
	b, err := json.Marshal(v)
	if len(b) > maxInfo {
		b, err = json.Marshal(map[string]string{
			"omitted": fmt.Sprintf("%d bytes; the limit is %d bytes", len(b), maxInfo),
		})
	}
	return map[string]string{"info": string(b)}, err
}
