package podnet

import (
	"context"
	"log/slog"
	"net/netip"
)

// Noop leaves pods to the engine's own bridge. Two nodes then give the same addresses and cannot reach each other's pods, which is never
// what a cluster needs, so it says so.
type Noop struct{}

var _ Network = Noop{}

// NewNoop warns and returns the network.
func NewNoop(log *slog.Logger) Noop {
	log.Warn("no network plugin: pods get addresses of Docker's own bridge, which no other node can reach; give --network-plugin=cni for a cluster")
	return Noop{}
}

// Add implements Network.
func (Noop) Add(context.Context, Pod) ([]netip.Addr, error) { return nil, nil }

// Del implements Network.
func (Noop) Del(context.Context, Pod) error { return nil }

// IPs implements Network: the engine knows them.
func (Noop) IPs(string) []netip.Addr { return nil }

// Attached implements Network.
func (Noop) Attached() []string { return nil }

// Ready implements Network.
func (Noop) Ready() error { return nil }

// SetPodCIDR implements Network.
func (Noop) SetPodCIDR([]netip.Prefix) error { return nil }

// Mode implements Network.
func (Noop) Mode() string { return "bridge" }

// Close implements Network.
func (Noop) Close() error { return nil }
