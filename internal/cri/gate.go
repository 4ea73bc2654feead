package cri

import (
	"fmt"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/model"
)

// gate contains the checks and locks at the beginning of calls.
type gate struct {
	view  View
	names *keylock.Map // serialises calls on one name or ID
}

// host returns the engine's properties, or Unavailable with the reason. No list may appear empty
// while the engine is down: the kubelet would assume that all pods were removed.
func (g *gate) host() (model.Host, error) {
	e := g.view.Engine()
	if !e.Ready {
		return e.Host, fmt.Errorf("%s: %w", e.Reason, errdefs.ErrUnavailable)
	}
	return e.Host, nil
}

// connectedHost returns the engine's properties, or Unavailable with the reason. Unlike host, it
// does not wait for the first read of all containers.
func (g *gate) connectedHost() (model.Host, error) {
	e := g.view.Engine()
	if !e.Connected {
		return e.Host, fmt.Errorf("%s: %w", e.Reason, errdefs.ErrUnavailable)
	}
	return e.Host, nil
}
