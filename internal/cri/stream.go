package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Exec prepares a streaming exec and returns its URL, good for one use (CRI Exec).
func (s *Service) Exec(_ context.Context, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}

	c, err := s.running(r.GetContainerId())
	if err != nil {
		return nil, err
	}

	r.ContainerId = string(c.ID) // the request may have a part of it

	return s.Streams.GetExec(r)
}

// Attach prepares an attach to a container's main process and returns its URL, good for one use
// (CRI Attach).
func (s *Service) Attach(_ context.Context, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}

	c, err := s.running(r.GetContainerId())
	if err != nil {
		return nil, err
	}

	r.ContainerId = string(c.ID)

	return s.Streams.GetAttach(r)
}

// PortForward prepares connections to ports of a pod and returns the URL, good for one use (CRI
// PortForward).
func (s *Service) PortForward(
	_ context.Context, r *runtimeapi.PortForwardRequest,
) (*runtimeapi.PortForwardResponse, error) {
	if _, err := s.begin(r); err != nil {
		return nil, err
	}

	netns, err := s.OpenNetNS(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}

	netns.Close() // nil for the host's, which Close permits

	return s.Streams.GetPortForward(r)
}
