package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ContainerStatus describes one container from memory, with its limits from the kernel (CRI
// ContainerStatus). NotFound for an unknown ID and for the ID of a sandbox.
func (s *Service) ContainerStatus(
	_ context.Context, r *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	c, err := s.Visible.Container(r.GetContainerId())
	if err != nil {
		return nil, err
	}

	resp := &runtimeapi.ContainerStatusResponse{Status: s.Engine.Measure(c).Status()}
	if r.GetVerbose() {
		resp.Info, err = verboseInfo(map[string]any{
			"pid":       c.Pid,
			"sandboxID": c.SandboxID,
			"name":      c.Name,
			"logDriver": c.LogDriver,
		})
	}

	return resp, err
}
