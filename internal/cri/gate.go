package cri

import (
	"fmt"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/spec"
)

// gate has what calls check and lock before they act.
type gate struct {
	view  View
	names *keylock.Map // serialises calls on one name or ID
}

// host returns the engine as it is now, or Unavailable with the reason: an empty list would mean
// the end of all pods to a kubelet.
func (g *gate) host() (spec.Host, error) {
	e := g.view.Engine()
	if !e.Ready {
		return e.Host, fmt.Errorf("%s: %w", e.Reason, errdefs.ErrUnavailable)
	}
	return e.Host, nil
}

// connectedHost returns the engine as it is now, or Unavailable with the reason. Unlike host, it
// does not wait until all containers were read.
func (g *gate) connectedHost() (spec.Host, error) {
	e := g.view.Engine()
	if !e.Connected {
		return e.Host, fmt.Errorf("%s: %w", e.Reason, errdefs.ErrUnavailable)
	}
	return e.Host, nil
}

// begin checks what every RPC needs: a valid request, and an engine.
func (g *gate) begin(req any) (spec.Host, error) {
	if err := spec.Validate(req); err != nil {
		return spec.Host{}, err
	}
	return g.host()
}
