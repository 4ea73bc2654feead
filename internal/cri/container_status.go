package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ContainerStatus describes one container, from memory (CRI ContainerStatus). NotFound for an
// unknown ID, a sandbox's included.
func (s *Service) ContainerStatus(
	_ context.Context, r *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}

	c, err := s.View.Container(r.GetContainerId())
	if err != nil {
		return nil, err
	}

	resp := &runtimeapi.ContainerStatusResponse{Status: c.Status()}
	if r.GetVerbose() {
		resp.Info, err = verbose(map[string]any{
			"pid":       c.Pid,
			"sandboxID": c.SandboxID,
			"name":      c.Name,
			"logDriver": c.LogDriver,
		})
	}

	return resp, err
}
