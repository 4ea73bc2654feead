package podnet

import (
	"context"
	"log/slog"
	"net/netip"
)

// Noop leaves pods to the engine's own bridge. Two nodes then give the same addresses and cannot
// reach each other's pods, which is never right in a cluster, so it warns.
type Noop struct{}

var _ Network = Noop{}

const noopNotice = "no network plugin: pods get addresses of Docker's own bridge, which no other node can reach; " +
	"give --network-plugin=cni for a cluster"

// NewNoop warns and returns the network.
func NewNoop(log *slog.Logger) Noop {
	log.Warn(noopNotice)
	return Noop{}
}

// Connector implements Network: the engine connects the pods.
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
