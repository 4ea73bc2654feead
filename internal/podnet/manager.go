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
)

// Namespaces creates network namespaces before their sandboxes exist; see Pins.
type Namespaces interface {
	Create(sysctls map[string]string) (path string, err error)
	Drop(path string) error
	Sweep() error
	Keep(id model.ContainerID, path string) (pin string, err error)
}

// SandboxPins manages the pinned network namespaces of sandboxes; see Pins.
type SandboxPins interface {
	Pin(id model.ContainerID, pid int) (path string, err error) // NotFound if the process is not the sandbox's
	OpenPin(id model.ContainerID) (*os.File, error)             // NotFound if nothing is pinned
	Path(id model.ContainerID) string                           // "" if nothing is pinned
	Joined(id model.ContainerID, pid int) bool
	Addresses(id model.ContainerID, pid int) []netip.Addr
	Unpin(id model.ContainerID) error
	List() []model.ContainerID
}

// Checkpoints reads the checkpoints of older shims; see checkpoint.Files.
type Checkpoints interface {
	Read(id model.ContainerID) (checkpoint.Checkpoint, error) // NotFound or DataLoss
	List() []model.ContainerID
	Remove(id model.ContainerID) error
}

// ManagerConfig holds the dependencies of a Manager. All except Now are required.
type ManagerConfig struct {
	Network     Network
	Namespaces  Namespaces
	Pins        SandboxPins
	Checkpoints Checkpoints
	Now         func() time.Time // time.Now if nil
	Log         *slog.Logger
}

// Manager owns all state of pod networks: namespaces, connections, pending releases, and the
// checkpoints of older shims. It is safe for concurrent use.
//
// A pod's network starts with Prepare and Keep, or with a namespace created by the engine. Connect
// and Confirm connect it, and Disconnect releases everything. Adopt takes over pods of older shims,
// and Reclaim releases the networks of removed pods.
type Manager struct {
	network     Network
	connector   Connector // nil if the engine connects pods
	namespaces  Namespaces
	pins        SandboxPins
	checkpoints Checkpoints
	now         func() time.Time
	log         *slog.Logger

	locks    *keylock.Map // by sandbox ID: serialises changes of a pod's network
	backlog  *backlog
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
		backlog:     newBacklog(),
	}
	if m.now == nil {
		m.now = time.Now
	}

	return m
}

// ConnectsPods reports whether this Manager connects pods instead of the engine.
func (m *Manager) ConnectsPods() bool { return m.connector != nil }

// State returns a warning about the network, or "", and an error with the remedy if pods cannot be
// connected.
func (m *Manager) State() (notice string, err error) { return m.network.Notice(), m.network.Ready() }

// SetPodCIDR sets the node's pod CIDRs (UpdateRuntimeConfig).
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

// Leftovers returns a channel that receives a value when Reclaim has new work.
func (m *Manager) Leftovers() <-chan struct{} { return m.backlog.wake }

// RequestReclaim makes Leftovers report new work for Reclaim. It never blocks.
func (m *Manager) RequestReclaim() { m.backlog.signal() }

// PendingReleases returns the number of pods with an unreleased network.
func (m *Manager) PendingReleases() int { return m.backlog.count() }

// Attached lists the sandboxes with a connection.
func (m *Manager) Attached() []string {
	if !m.ConnectsPods() {
		return nil
	}
	return m.connector.Attached()
}

// pod describes a sandbox to a Connector.
func (m *Manager) pod(sb *model.Sandbox) Pod {
	return Pod{
		ID:          string(sb.ID),
		Name:        sb.Metadata.GetName(),
		Namespace:   sb.Metadata.GetNamespace(),
		UID:         sb.Metadata.GetUid(),
		NetNS:       m.pins.Path(sb.ID),
		Annotations: sb.Annotations,
	}
}

// lock serialises changes of one pod's network, even if the pod is otherwise unknown.
func (m *Manager) lock(ctx context.Context, id model.ContainerID) (unlock func(), err error) {
	unlock, err = m.locks.Lock(ctx, string(id))
	if err != nil {
		return nil, fmt.Errorf("network of sandbox %s: %w", id, err)
	}
	return unlock, nil
}

// Prepare creates a network namespace with these sysctls (such as "net.core.somaxconn") for a
// future sandbox. The returned path is valid until drop. It returns InvalidArgument for an invalid
// sysctl.
func (m *Manager) Prepare(sysctls map[string]string) (netns string, drop func(), err error) {
	netns, err = m.namespaces.Create(sysctls)
	if err != nil {
		return "", nil, err
	}

	drop = func() { // a pin of Keep keeps the namespace alive
		if err := m.namespaces.Drop(netns); err != nil {
			m.log.Warn("cannot drop a network namespace; the next start of the daemon retries", "err", err)
		}
	}

	return netns, drop, nil
}

// Keep pins a namespace of Prepare for its sandbox. It blocks Reclaim until release is called,
// because the pause process may not be running yet.
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

// Connect connects a pod according to its configuration and returns its addresses. The pod uses the
// namespace of Keep or that of its pause process. Connect pins the latter first. Disconnect undoes
// Connect, also after an error.
func (m *Manager) Connect(
	ctx context.Context, sb *model.Sandbox, cfg *runtimeapi.PodSandboxConfig,
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

// HasJoined reports whether a process belongs to the sandbox and runs in its pinned namespace.
func (m *Manager) HasJoined(id model.ContainerID, pid int) bool { return m.pins.Joined(id, pid) }

// Confirm marks a connected pod as complete. Only then does Addresses return its addresses.
func (m *Manager) Confirm(id model.ContainerID) error {
	if !m.ConnectsPods() {
		return nil
	}
	return m.connector.Confirm(string(id))
}

// Addresses returns the addresses of a pod, the primary one first, and none on the host network. If
// libcni's cache lacks an older shim's pod, it reads the addresses in the pod's namespace.
func (m *Manager) Addresses(sb *model.Sandbox) []netip.Addr {
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

// IsConnected reports whether a pod has the network of Connect.
func (m *Manager) IsConnected(sb *model.Sandbox) bool {
	return sb.HostNetwork() || !m.ConnectsPods() || len(m.Addresses(sb)) > 0
}

// NetNS opens the network namespace of a pod: the pinned one, or that of its verified pause
// process. It returns NotFound if neither exists.
func (m *Manager) NetNS(sb *model.Sandbox) (*os.File, error) {
	netns, err := m.pins.OpenPin(sb.ID)
	if errdefs.IsNotFound(err) {
		return OpenProcess(sb.ID, sb.Pid)
	}
	return netns, err
}

// Check returns the path of a pod's pinned namespace and the result of CNI CHECK: "ok", an error,
// or "" for a pod without a connection.
func (m *Manager) Check(ctx context.Context, sb *model.Sandbox) (netns, result string) {
	netns = m.pins.Path(sb.ID)
	if !sb.Running || sb.HostNetwork() || !m.ConnectsPods() || m.connector.IPs(string(sb.ID)) == nil {
		return netns, ""
	}
	if err := m.connector.Check(ctx, m.pod(sb)); err != nil {
		return netns, err.Error()
	}

	return netns, "ok"
}

// Holds reports whether a pod still has network resources.
func (m *Manager) Holds(id model.ContainerID) bool {
	_, err := m.checkpoints.Read(id)
	return m.pins.Path(id) != "" || slices.Contains(m.Attached(), string(id)) || !errdefs.IsNotFound(err)
}
