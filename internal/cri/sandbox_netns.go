package cri

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
)

// OpenNetNS opens the network namespace of a running sandbox. It returns nil for the host's.
// NotFound for an unknown sandbox, FailedPrecondition if it is not ready.
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
