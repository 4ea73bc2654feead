// Package spec is the vocabulary of the house and its only translator: it turns CRI requests into
// what Docker is told, and what Docker answers into the records that CRI answers are made from. It
// is pure: no I/O, clock, logger or context, so every rule in it is proved by golden files
// (testdata) and fuzzing. All packages that act (engine, node, cri) speak in its types; it imports
// none of them.
//
// Names and labels follow the scheme that dockershim and its successors share, so that pods survive
// a change of the shim in both directions.
package spec

import (
	"net/netip"
	"time"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// Host is what the translation must know of the engine and of this machine. It is read once per
// connection and never changes while the engine runs.
type Host struct {
	EngineVersion   string // e.g. "20.10.24"
	APIVersion      string // negotiated, e.g. "1.41"
	OperatingSystem string // "linux" or "windows"
	Architecture    string // as the engine says it: "x86_64", "aarch64"
	CgroupDriver    string // "cgroupfs" or "systemd"
	CgroupVersion   string // "1" or "2"
	StorageDriver   string
	ContainerdStore bool   // images are in containerd's store, not in a graph driver's
	RootDir         string // the engine's data root
	DefaultRuntime  string
	Runtimes        []string // OCI runtimes that the engine has configured, sorted
	SecurityOptions []string // names only: "apparmor", "seccomp", "selinux", "rootless", "userns"
	CDI             bool     // the engine knows the Container Device Interface
	LiveRestore     bool
	LogDriver       string // of containers that name none
	// MinOOMScoreAdj is the lowest oom_score_adj that a container can get here: -1000, or higher
	// where CAP_SYS_RESOURCE is missing.
	MinOOMScoreAdj int
}

// Create is one container as Docker is told to make it (POST /containers/create).
type Create struct {
	Name   string
	Config *container.Config
	Host   *container.HostConfig
	// MakeDirs are host paths of bind mounts that must exist as directories before the container is
	// made; the missing ones are made (what the kubelet expects of a hostPath without a type).
	MakeDirs []string
	// Warnings say what was changed in the request so that Docker accepts it, for the log.
	Warnings []string
}

// Update is a change of a container's resources: what Docker is told (POST
// /containers/{id}/update), and what it cannot be told.
type Update struct {
	Resources container.Resources
	Kernel    KernelLimits
	Warnings  []string // as in Create
}

// KernelLimits are resources that Docker's API cannot carry; they are written to the kernel while
// the container runs.
type KernelLimits struct {
	OOMScoreAdj int                         `json:"-"`                   // of every process; 0 leaves it as it is
	Hugepages   map[model.PageSize]uint64   `json:"hugepages,omitempty"` // bytes
	Unified     map[model.UnifiedKey]string `json:"unified,omitempty"`   // file of cgroup v2: value
}

// Empty says whether there is nothing to write.
func (l KernelLimits) Empty() bool {
	return l.OOMScoreAdj == 0 && len(l.Hugepages) == 0 && len(l.Unified) == 0
}

// LogConfig is how Docker is told to keep a container's output.
type LogConfig struct {
	Driver  string            // e.g. "json-file"
	Options map[string]string // driver options
}

// Object is one container of Docker's as the record it stands for. At most one field is set; none
// for a container that is not ours.
type Object struct {
	Sandbox   *Sandbox
	Container *Container
	// Unread is the ID of a container that the engine lists and could not describe in time. The
	// record, if there is one, is what the list alone says, and is marked as stale.
	Unread model.ContainerID
}

// Sandbox is the record of one pod sandbox: everything that Docker remembers of it, in CRI's terms.
// It is shared and must not be changed.
type Sandbox struct {
	ID             model.ContainerID // of the pause container
	Name           string            // the container's name, without slash
	Image          string            // of the pause, as it was created
	Metadata       *runtimeapi.PodSandboxMetadata
	Labels         map[string]string
	Annotations    map[string]string
	RuntimeHandler string // as requested in RunPodSandbox
	Namespaces     *runtimeapi.NamespaceOption
	CreatedAt      time.Time
	StartedAt      time.Time // of the pause process; zero before
	FinishedAt     time.Time // of the pause process; zero while it runs
	Running        bool      // the pause process runs
	// it runs, and not for the first time: its namespaces are not the pod's
	Restarted    bool
	NeverStarted bool // made, and its pause has not run
	Pid          int  // of the pause process, 0 when it does not run
	NetworkMode  string
	// in the node's user namespace, although the engine maps users
	HostUsers bool
	// the pod's network namespace is one of ours, which the pause joined; NetworkMode says "host"
	OwnNetNS bool
	ExitCode int // of the pause process, when it does not run
	// addresses that the engine gave; only with the no-op network
	EngineIPs []netip.Addr
	// host ports that the engine publishes; only with the no-op network
	EnginePorts    []*runtimeapi.PortMapping
	Foreign        bool // made by an older shim: it has no record of ours
	ResolvConfPath string
	HostsPath      string
	CgroupParent   string
	Runtime        string // the OCI runtime, as HostConfig.Runtime has it
	Own            PodResources
	Stale          bool // from the engine's list alone: no process, times or paths
}

// PodResources are what RunPodSandbox says of the pod as a whole. The pod's control group is the
// kubelet's; the runtime records them.
type PodResources struct {
	Overhead  *runtimeapi.LinuxContainerResources `json:"overhead,omitempty"`
	Resources *runtimeapi.LinuxContainerResources `json:"resources,omitempty"`
}

// Ready says whether the sandbox is READY in CRI's terms. A pause that somebody has started again
// (docker restart) has made new namespaces, or none: containers of the pod live in the old ones, or
// ended with them. The kubelet replaces a pod that is not ready.
func (s *Sandbox) Ready() bool { return s.Running && !s.Restarted }

// HostNetwork says whether the pod lives in the node's network namespace.
func (s *Sandbox) HostNetwork() bool {
	return s.Namespaces.GetNetwork() == runtimeapi.NamespaceMode_NODE
}

// The engine's network modes of sandboxes with a namespace that the engine makes.
const (
	networkNone   = "none"   // something else connects the pod
	networkBridge = "bridge" // the engine connects it
)

// NetworkMode returns the engine's network mode for sandboxes.
func NetworkMode(isConnectedByUs bool) string {
	if isConnectedByUs {
		return networkNone
	}
	return networkBridge
}

// IsWithoutNetwork reports whether the engine made the pod's network namespace and left it
// unconnected.
func (s *Sandbox) IsWithoutNetwork() bool { return s.NetworkMode == networkNone }

// EngineNetwork reports whether the engine connects the pod, as it does with the no-op network.
func (s *Sandbox) EngineNetwork() bool {
	return !s.HostNetwork() && !s.OwnNetNS && s.NetworkMode != "" && !s.IsWithoutNetwork()
}

// Container is the record of one container. It is shared and must not be changed.
type Container struct {
	ID            model.ContainerID
	Name          string // the container's name, without slash
	SandboxID     model.ContainerID
	Metadata      *runtimeapi.ContainerMetadata
	Labels        map[string]string
	Annotations   map[string]string
	Image         string // as the container was created: a name or an ID
	ImageID       model.ImageID
	ImageRef      string // the image's digested name, its ID if it has none
	State         runtimeapi.ContainerState
	CreatedAt     time.Time
	StartedAt     time.Time // zero before the start
	FinishedAt    time.Time // zero before the end
	ExitCode      int32
	Reason        string // Completed, Error, OOMKilled, ContainerCannotRun
	Message       string
	Pid           int    // 0 when it does not run
	LogPath       string // <LogDirectory>/<LogPath> of CRI; "" without one
	EngineLogPath string // the engine's own log file (json-file), "" with other drivers
	LogDriver     string
	Mounts        []*runtimeapi.Mount
	ImageVolumes  []ImageVolume
	Resources     *runtimeapi.ContainerResources
	Kernel        KernelLimits // to be written when it starts
	User          *runtimeapi.ContainerUser
	StopSignal    runtimeapi.Signal
	TTY           bool
	Stdin         bool
	StdinOnce     bool
	Stale         bool // from the engine's list alone: no process, limits, mounts or times
}

// Image is the record of one image. It is shared and must not be changed.
type Image struct {
	ID          model.ImageID
	RepoTags    []string
	RepoDigests []string
	Size        int64  // bytes
	User        string // the image's USER
	Entrypoint  bool   // the image has an ENTRYPOINT or CMD; false: a command is required
	// Labels are the image's own, without those of an image that has more than maxImageLabels
	// bytes.
	Labels     map[string]string
	manyLabels bool // Labels are not complete
	Pinned     bool // never to be collected
	// not described by the engine in time: User, Entrypoint and Labels may be missing
	Stale bool
}
