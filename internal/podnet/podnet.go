// Package podnet connects pods to their network: CNI (any conformant plugins), kubenet (a bridge on
// the node's pod CIDR, created by the standard plugins from a generated configuration) or no-op
// (the engine's own bridge). libcni's cache records completed connections, and a journal beside it
// records operations in progress. So a restart, a change of configuration or a crash never loses
// the information needed to undo a connection.
package podnet

import (
	"context"
	"net/netip"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod describes a sandbox to a network.
type Pod struct {
	ID          string // the sandbox ID, CNI_CONTAINERID
	Name        string
	Namespace   string
	UID         string
	NetNS       string // path of the network namespace; empty if it no longer exists (DEL without a namespace)
	Annotations map[string]string
	// Ports with a host port become the capability portMappings. DEL uses them if the cache has no
	// ports.
	Ports []*runtimeapi.PortMapping
	DNS   *runtimeapi.DNSConfig
	// CgroupParent is the control group of the pod, the capability cgroupPath.
	CgroupParent string
	Foreign      bool // connected by an older shim, possibly without an entry in libcni's cache
}

// title returns the name of a pod for errors. For a removed sandbox only the ID is known.
func (p Pod) title() string {
	if p.Name == "" {
		return p.ID
	}
	return p.Namespace + "/" + p.Name
}

// Network is the pod network of a node: CNI, kubenet or no-op. All methods are safe for concurrent
// use.
type Network interface {
	// Connector returns the Connector of this network. It is nil if the engine connects pods.
	Connector() Connector
	// Ready returns nil if pods can be connected, otherwise the reason and the remedy.
	Ready() error
	// Notice returns a warning about a ready network, or "".
	Notice() string
	// SetPodCIDR sets the node's pod CIDRs (UpdateRuntimeConfig). Networks without address
	// management of their own ignore them.
	SetPodCIDR(cidrs []netip.Prefix) error
	// Run watches the configuration, and the directories of plugins for reinstalled ones, until ctx
	// ends. Before Run, Ready returns the initial state.
	Run(ctx context.Context)
	// Close releases resources of the network itself. Pods stay connected.
	Close() error
}

// Connector connects pods to a network and disconnects them. All methods are safe for concurrent
// use. The caller serialises calls for the same pod.
type Connector interface {
	// Add connects the pod and returns its addresses, the primary one first. After an error the
	// caller releases the pod with Del. Attached lists the pod until then, unless Add failed before
	// it started.
	Add(ctx context.Context, p Pod) ([]netip.Addr, error)
	// Confirm marks the pod as complete. Until then IPs returns none of its addresses, and a
	// restarted daemon treats the pod as unfinished.
	Confirm(sandboxID string) error
	// Del disconnects the pod with the configuration used to connect it. It is idempotent and
	// accepts a pod without a connection. Resources of uninstalled plugins are released once these
	// are installed again; this is not an error. A *MissingPluginError reports a missing IPAM
	// program: the caller may remove the pod, but must keep its namespace and call Del again later.
	Del(ctx context.Context, p Pod) error
	// Check returns nil if a connected pod still has the network of Add, as far as the plugins can
	// verify.
	Check(ctx context.Context, p Pod) error
	// Collect asks the plugins to release resources of unknown connections. It waits for every Add
	// and blocks new ones.
	Collect(ctx context.Context) error
	// Adopt records the connection of an older shim's pod. Collect spares it, and Attached lists
	// it.
	Adopt(sandboxID string)
	// IPs returns the addresses of a connected and confirmed pod from memory, nil if it has none.
	// They survive a restart of the daemon.
	IPs(sandboxID string) []netip.Addr
	// Attached lists the sandboxes with a connection.
	Attached() []string
}
