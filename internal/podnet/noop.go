package podnet

import (
	"context"
	"log/slog"
	"net/netip"
)

// Noop leaves pods on the engine's own bridge. It logs a warning: nodes then assign the same
// addresses and cannot reach each other's pods, which is unsuitable for a cluster.
type Noop struct{}

var _ Network = Noop{}

const noopNotice = "no network plugin: pods get addresses of Docker's own bridge, unreachable from other nodes; " +
	"use --network-plugin=cni in a cluster"

// NewNoop logs a warning and returns the network.
func NewNoop(log *slog.Logger) Noop {
	log.Warn(noopNotice)
	return Noop{}
}

// Connector implements Network. The engine connects the pods.
func (Noop) Connector() Connector { return nil }

// Ready implements Network.
func (Noop) Ready() error { return nil }

// Notice implements Network.
func (Noop) Notice() string { return noopNotice }

// SetPodCIDR implements Network.
func (Noop) SetPodCIDR([]netip.Prefix) error { return nil }

// Run implements Network.
func (Noop) Run(context.Context) {}

// Close implements Network.
func (Noop) Close() error { return nil }
