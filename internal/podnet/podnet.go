// Package podnet gives pods their network: CNI (any conformant plugins), kubenet (a bridge on the node's pod CIDR, made by the standard
// plugins from a generated configuration) and no-op (the engine's own bridge). What a pod got is remembered by libcni's cache, and what it
// is getting by a journal beside it, so a restart, a change of configuration or a crash never loses the means to undo it.
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
	Ports       []*runtimeapi.PortMapping // those with a host port become the capability portMappings; of a DEL, if the cache has none
	DNS         *runtimeapi.DNSConfig
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

// Network is the contract that CNI, kubenet and the no-op network keep. All methods may be called at once from many goroutines; calls for
// one pod are serialised by the caller.
type Network interface {
	// Add connects the pod and returns its addresses, the primary one first. After an error the
	// caller releases the pod with Del; Attached lists it until then, unless nothing has begun.
	Add(ctx context.Context, p Pod) ([]netip.Addr, error)
	// Confirm says that the pod is complete. Before, IPs knows no addresses of it, and a daemon that starts takes it for one that was never
	// finished.
	Confirm(sandboxID string) error
	// Del disconnects the pod with the configuration with which it was connected. It is idempotent;
	// a pod never connected is no error. What plugins hold that were uninstalled is released when
	// they are back, and no error. An *OwedError says that a program for addresses is missing: the
	// pod may go, but not its namespace, and Del is to be called again later.
	Del(ctx context.Context, p Pod) error
	// Check is nil if a connected pod still has what Add gave, as far as the plugins can tell.
	Check(ctx context.Context, p Pod) error
	// Collect has the plugins release what belongs to no connection of ours. It waits for every Add and keeps others waiting.
	Collect(ctx context.Context) error
	// Adopt says that a pod holds a connection that an older shim has made; Collect spares it, and Attached lists it.
	Adopt(sandboxID string)
	// IPs are the addresses of a connected and confirmed pod, from memory; nil when it has none. Survives a restart of the daemon.
	IPs(sandboxID string) []netip.Addr
	// Attached lists the sandbox IDs that hold a connection, for the recovery of leftovers.
	Attached() []string
	// Ready is nil when pods can be connected, else the reason in words that an operator can act on.
	Ready() error
	// Notice is what an operator should know of a network that is ready, "" for nothing.
	Notice() string
	// SetPodCIDR tells the node's ranges (UpdateRuntimeConfig); networks that do not allot addresses themselves ignore it.
	SetPodCIDR(cidrs []netip.Prefix) error
	// Mode is the engine's network mode for sandboxes: "none" when we connect them, "bridge" when the engine does.
	Mode() string
	// Run follows what Ready depends on, and what uninstalled plugins hold, until ctx ends. Ready
	// tells the state at the beginning until then.
	Run(ctx context.Context)
	// Close frees what the network itself holds; pods stay connected.
	Close() error
}
