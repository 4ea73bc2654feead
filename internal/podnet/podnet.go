// Package podnet gives pods their network: CNI (any conformant plugins), kubenet (a bridge on the
// node's pod CIDR, made by the standard plugins from a generated configuration) and no-op (the
// engine's own bridge). What a pod got is remembered by libcni's cache, and what it is getting by a
// journal beside it, so a restart, a change of configuration or a crash never loses the means to
// undo it.
package podnet

import (
	"context"
	"net/netip"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod is one sandbox as a network needs to know it.
type Pod struct {
	ID          string // the sandbox ID, CNI_CONTAINERID
	Name        string
	Namespace   string
	UID         string
	NetNS       string // path of the network namespace; "" when it is gone (DEL without one)
	Annotations map[string]string
	// those with a host port become the capability portMappings; of a DEL, if the cache has none
	Ports []*runtimeapi.PortMapping
	DNS   *runtimeapi.DNSConfig
	// CgroupParent is the control group of the pod, the capability cgroupPath.
	CgroupParent string
	Foreign      bool // an older shim has connected it, perhaps without an entry in libcni's cache
}

// title is how errors call a pod; of one whose sandbox is gone only the ID is known.
func (p Pod) title() string {
	if p.Name == "" {
		return p.ID
	}
	return p.Namespace + "/" + p.Name
}

// Network is the pod network of a node: CNI, kubenet or no-op. All methods are safe for concurrent
// use.
type Network interface {
	// Connector connects pods. It is nil if the engine does so.
	Connector() Connector
	// Ready is nil when pods can be connected, else the reason, with the fix.
	Ready() error
	// Notice is a warning about a network that is ready, "" for none.
	Notice() string
	// SetPodCIDR sets the node's ranges (UpdateRuntimeConfig). Networks that do not allot addresses
	// themselves ignore them.
	SetPodCIDR(cidrs []netip.Prefix) error
	// Run watches the configuration, and for the return of uninstalled plugins, until ctx ends.
	// Until it is called, Ready returns the state at the beginning.
	Run(ctx context.Context)
	// Close releases resources of the network itself. Pods stay connected.
	Close() error
}

// Connector connects pods to a network and disconnects them. All methods are safe for concurrent
// use; calls for one pod are serialised by the caller.
type Connector interface {
	// Add connects the pod and returns its addresses, the primary one first. After an error the
	// caller releases the pod with Del; Attached lists it until then, unless nothing has begun.
	Add(ctx context.Context, p Pod) ([]netip.Addr, error)
	// Confirm marks the pod as complete. Before, IPs has no addresses of it, and a daemon that
	// starts takes it for one that was never finished.
	Confirm(sandboxID string) error
	// Del disconnects the pod with the configuration with which it was connected. It is idempotent;
	// a pod never connected is no error. What uninstalled plugins hold is released when they are
	// back, and is no error. An *OwedError reports that a program for addresses is missing: the pod
	// may be removed, but not its namespace, and Del is to be called again later.
	Del(ctx context.Context, p Pod) error
	// Check is nil if a connected pod still has what Add gave, as far as the plugins can tell.
	Check(ctx context.Context, p Pod) error
	// Collect has the plugins release what belongs to no connection of ours. It waits for every Add
	// and keeps others waiting.
	Collect(ctx context.Context) error
	// Adopt notes that a pod holds a connection of an older shim. Collect spares it, and Attached
	// lists it.
	Adopt(sandboxID string)
	// IPs returns the addresses of a connected and confirmed pod, from memory; nil when it has
	// none. They survive a restart of the daemon.
	IPs(sandboxID string) []netip.Addr
	// Attached lists the sandboxes that hold a connection.
	Attached() []string
}
