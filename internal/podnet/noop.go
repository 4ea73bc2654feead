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

const noopNotice = "no network plugin: pods get addresses of Docker's own bridge, which no other node can reach; give --network-plugin=cni for a cluster"

// NewNoop warns and returns the network.
func NewNoop(log *slog.Logger) Noop {
	log.Warn(noopNotice)
	return Noop{}
}

// Add implements Network.
func (Noop) Add(context.Context, Pod) ([]netip.Addr, error) { return nil, nil }

// Confirm implements Network.
func (Noop) Confirm(string) error { return nil }

// Del implements Network.
func (Noop) Del(context.Context, Pod) error { return nil }

// Check implements Network.
func (Noop) Check(context.Context, Pod) error { return nil }

// Collect implements Network.
func (Noop) Collect(context.Context) error { return nil }

// Adopt implements Network.
func (Noop) Adopt(string) {}

// IPs implements Network: the engine knows them.
func (Noop) IPs(string) []netip.Addr { return nil }

// Attached implements Network.
func (Noop) Attached() []string { return nil }

// Ready implements Network.
func (Noop) Ready() error { return nil }

// Notice implements Network: the trap is told as long as it is open.
func (Noop) Notice() string { return noopNotice }

// Run implements Network: nothing is to be followed.
func (Noop) Run(context.Context) {}

// SetPodCIDR implements Network.
func (Noop) SetPodCIDR([]netip.Prefix) error { return nil }

// Mode implements Network.
func (Noop) Mode() string { return "bridge" }

// Close implements Network.
func (Noop) Close() error { return nil }
