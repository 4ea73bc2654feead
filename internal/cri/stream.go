package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Exec prepares a streaming exec and returns a single-use URL (CRI Exec).
func (s *Service) Exec(_ context.Context, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	c, err := s.runningContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}

	r.ContainerId = string(c.ID) // the request may contain only a prefix

	return s.Streams.GetExec(r)
}

// Attach prepares an attach to a container's main process and returns a single-use URL (CRI
// Attach).
func (s *Service) Attach(_ context.Context, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	c, err := s.runningContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}

	r.ContainerId = string(c.ID)

	return s.Streams.GetAttach(r)
}

// PortForward prepares connections to ports of a pod and returns a single-use URL (CRI
// PortForward).
func (s *Service) PortForward(
	_ context.Context, r *runtimeapi.PortForwardRequest,
) (*runtimeapi.PortForwardResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	netns, err := s.OpenNetNS(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}

	netns.Close() // nil for the host network; Close permits it

	return s.Streams.GetPortForward(r)
}
