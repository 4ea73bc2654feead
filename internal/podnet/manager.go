package podnet

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// Namespaces are network namespaces that are made before their sandbox; see Pins.
type Namespaces interface {
	Make(sysctls map[string]string) (path string, err error)
	Drop(path string) error
	Sweep() error
	Keep(id model.ContainerID, path string) (pin string, err error)
}

// SandboxPins are the pinned network namespaces of sandboxes; see Pins.
type SandboxPins interface {
	Pin(id model.ContainerID, pid int) (path string, err error) // NotFound if the process is not the sandbox's
	OpenPin(id model.ContainerID) (*os.File, error)             // NotFound if nothing is pinned
	Path(id model.ContainerID) string                           // "" if nothing is pinned
	Joined(id model.ContainerID, pid int) bool
	Addresses(id model.ContainerID, pid int) []netip.Addr
	Unpin(id model.ContainerID) error
	List() []model.ContainerID
}

// Checkpoints are what older shims noted of their sandboxes; see checkpoint.Files.
type Checkpoints interface {
	Read(id model.ContainerID) (checkpoint.Checkpoint, error) // NotFound, or DataLoss
	List() []model.ContainerID
	Remove(id model.ContainerID) error
}

// ManagerConfig has the parts of a Manager, all required but Now.
type ManagerConfig struct {
	Network     Network
	Namespaces  Namespaces
	Pins        SandboxPins
	Checkpoints Checkpoints
	Now         func() time.Time // time.Now if nil
	Log         *slog.Logger
}

// Manager has all state of pods' networks: their namespaces, their connections, the releases that
// are under way or owed, and the checkpoints of older shims. It is safe for concurrent use.
//
// The network of a pod begins with Prepare and Keep, or with a namespace of the engine's. Connect
// and Confirm connect it, Disconnect releases everything. Adopt takes over the pods of older shims,
// and Reclaim releases what has no pod any more.
type Manager struct {
	network     Network
	connector   Connector // nil if the engine connects pods
	namespaces  Namespaces
	pins        SandboxPins
	checkpoints Checkpoints
	now         func() time.Time
	log         *slog.Logger

	locks    *keylock.Map // by sandbox ID: serialises the changes of a pod's network
	debts    *debts
	releases releases
}

// NewManager returns the Manager of a node's pod network.
func NewManager(c ManagerConfig) *Manager {
	m := &Manager{
		network:     c.Network,
		connector:   c.Network.Connector(),
		namespaces:  c.Namespaces,
		pins:        c.Pins,
		checkpoints: c.Checkpoints,
		now:         c.Now,
		log:         c.Log,
		locks:       keylock.New(),
		debts:       newDebts(),
	}
	if m.now == nil {
		m.now = time.Now
	}

	return m
}

// ConnectsPods reports whether this Manager connects pods, and not the engine.
func (m *Manager) ConnectsPods() bool { return m.connector != nil }

// State returns a warning about the network, "" for none, and why pods cannot be connected, with
// the fix; nil if they can.
func (m *Manager) State() (notice string, err error) { return m.network.Notice(), m.network.Ready() }

// SetPodCIDR sets the node's ranges (UpdateRuntimeConfig).
func (m *Manager) SetPodCIDR(cidrs []netip.Prefix) error { return m.network.SetPodCIDR(cidrs) }

// Reload reads the configuration of the network again, if it has one.
func (m *Manager) Reload(ctx context.Context) {
	if r, ok := m.network.(interface{ Reload(context.Context) }); ok {
		r.Reload(ctx)
	}
}

// Run follows the network until ctx ends; see Network.
func (m *Manager) Run(ctx context.Context) { m.network.Run(ctx) }

// Close releases resources of the network itself. Pods stay connected.
func (m *Manager) Close() error { return m.network.Close() }

// Leftovers receives when Reclaim has something new to do.
func (m *Manager) Leftovers() <-chan struct{} { return m.debts.wake }

// RequestReclaim has Leftovers report that Reclaim has something new to do. It never blocks.
func (m *Manager) RequestReclaim() { m.debts.signal() }

// Owed returns the number of pods whose network could not be released yet.
func (m *Manager) Owed() int { return m.debts.count() }

// Attached lists the sandboxes that hold a connection.
func (m *Manager) Attached() []string {
	if !m.ConnectsPods() {
		return nil
	}
	return m.connector.Attached()
}

// pod returns a sandbox as a Connector needs it.
func (m *Manager) pod(sb *spec.Sandbox) Pod {
	return Pod{
		ID:          string(sb.ID),
		Name:        sb.Metadata.GetName(),
		Namespace:   sb.Metadata.GetNamespace(),
		UID:         sb.Metadata.GetUid(),
		NetNS:       m.pins.Path(sb.ID),
		Annotations: sb.Annotations,
	}
}

// lock serialises the changes of one pod's network, also if nobody else knows the pod any more.
func (m *Manager) lock(ctx context.Context, id model.ContainerID) (unlock func(), err error) {
	unlock, err = m.locks.Lock(ctx, string(id))
	if err != nil {
		return nil, fmt.Errorf("network of sandbox %s: %w", id, err)
	}
	return unlock, nil
}

// Prepare makes a network namespace with these sysctls ("net.core.somaxconn") for a sandbox that is
// not created yet, and returns its path until drop. InvalidArgument for a sysctl that cannot be
// set.
func (m *Manager) Prepare(sysctls map[string]string) (netns string, drop func(), err error) {
	netns, err = m.namespaces.Make(sysctls)
	if err != nil {
		return "", nil, err
	}

	drop = func() { // it lives on where Keep has pinned it
		if err := m.namespaces.Drop(netns); err != nil {
			m.log.Warn("a network namespace could not be dropped; the next start does", "err", err)
		}
	}

	return netns, drop, nil
}

// Keep pins a namespace of Prepare for its sandbox, and keeps Reclaim away until release: the pause
// need not run yet.
func (m *Manager) Keep(ctx context.Context, id model.ContainerID, netns string) (release func(), err error) {
	unlock, err := m.lock(ctx, id)
	if err != nil {
		return nil, err
	}

	if _, err := m.namespaces.Keep(id, netns); err != nil {
		unlock()
		return nil, err
	}

	return unlock, nil
}

// Connect connects a pod as its configuration asks for, and returns its addresses. The pod has the
// namespace of Keep, or that of its pause, which is pinned first. Disconnect undoes Connect, also
// after an error.
func (m *Manager) Connect(
	ctx context.Context, sb *spec.Sandbox, cfg *runtimeapi.PodSandboxConfig,
) ([]netip.Addr, error) {
	if !m.ConnectsPods() {
		return nil, nil
	}

	if !sb.OwnNetNS {
		if _, err := m.pins.Pin(sb.ID, sb.Pid); err != nil {
			return nil, err
		}
	}

	p := m.pod(sb)
	p.Ports, p.DNS = cfg.GetPortMappings(), cfg.GetDnsConfig()
	p.CgroupParent = cfg.GetLinux().GetCgroupParent()

	return m.connector.Add(ctx, p)
}

// HasJoined reports whether a process is the sandbox's and in the namespace that Keep pinned for
// it.
func (m *Manager) HasJoined(id model.ContainerID, pid int) bool { return m.pins.Joined(id, pid) }

// Confirm marks a connected pod as complete. Only then Addresses has those of Connect.
func (m *Manager) Confirm(id model.ContainerID) error {
	if !m.ConnectsPods() {
		return nil
	}
	return m.connector.Confirm(string(id))
}

// Addresses returns the addresses of a pod, the primary one first; none on the host network. Where
// libcni's cache lacks those of an older shim's pod, they are read in the pod's namespace.
func (m *Manager) Addresses(sb *spec.Sandbox) []netip.Addr {
	if sb.HostNetwork() {
		return nil
	}

	if m.ConnectsPods() {
		if ips := m.connector.IPs(string(sb.ID)); ips != nil {
			return ips
		}
	}

	if sb.Foreign && sb.Running && sb.IsWithoutNetwork() {
		return m.pins.Addresses(sb.ID, sb.Pid)
	}

	return sb.EngineIPs
}

// IsConnected reports whether a pod has the network that Connect gives.
func (m *Manager) IsConnected(sb *spec.Sandbox) bool {
	return sb.HostNetwork() || !m.ConnectsPods() || len(m.Addresses(sb)) > 0
}

// NetNS opens the network namespace of a pod: the pinned one, or that of a process that is verified
// to be its pause. NotFound if there is neither.
func (m *Manager) NetNS(sb *spec.Sandbox) (*os.File, error) {
	netns, err := m.pins.OpenPin(sb.ID)
	if errdefs.IsNotFound(err) {
		return OpenProcess(sb.ID, sb.Pid)
	}
	return netns, err
}

// Check returns the path of a pod's pinned namespace, and the plugins' opinion of its connection
// (CNI CHECK): "ok", an error, or "" if it has none.
func (m *Manager) Check(ctx context.Context, sb *spec.Sandbox) (netns, result string) {
	netns = m.pins.Path(sb.ID)
	if !sb.Running || sb.HostNetwork() || !m.ConnectsPods() || m.connector.IPs(string(sb.ID)) == nil {
		return netns, ""
	}
	if err := m.connector.Check(ctx, m.pod(sb)); err != nil {
		return netns, err.Error()
	}

	return netns, "ok"
}

// Holds reports whether something of a pod's network is left.
func (m *Manager) Holds(id model.ContainerID) bool {
	_, err := m.checkpoints.Read(id)
	return m.pins.Path(id) != "" || slices.Contains(m.Attached(), string(id)) || !errdefs.IsNotFound(err)
}
