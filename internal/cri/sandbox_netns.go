package cri

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
)

// OpenNetNS opens a running sandbox's network namespace, nil for the host's. NotFound, or
// FailedPrecondition when the pod does not run.
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

	return s.Network.NetNS(sb)
}
