package model

import (
	"net/netip"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/shim/annotation"
)

// Sandbox is the record of a pod sandbox: Docker's facts about the pause container in terms of the
// CRI. It is shared and must not be changed.
type Sandbox struct {
	ID             ContainerID // of the pause container
	Name           string      // of the pause container, without slash
	Image          string      // of the pause container, as named at its creation
	Metadata       *runtimeapi.PodSandboxMetadata
	Labels         map[string]string
	Annotations    map[string]string
	RuntimeHandler string // as requested in RunPodSandbox
	Namespaces     *runtimeapi.NamespaceOption
	CreatedAt      time.Time
	StartedAt      time.Time // of the pause process; zero before its start
	FinishedAt     time.Time // of the pause process; zero while it runs
	Running        bool      // the pause process runs
	// the pause process was started again, so the pod's namespaces are lost
	Restarted    bool
	NeverStarted bool // created, and the pause process has not run
	Pid          int  // of the pause process; 0 if it does not run
	NetworkMode  string
	HostUsers    bool // runs in the node's user namespace although the engine maps users
	// OwnNetNS is set if the pause joined a network namespace of this program. NetworkMode is
	// "host" then.
	OwnNetNS       bool
	ExitCode       int                       // of the pause process, if it does not run
	EngineIPs      []netip.Addr              // addresses from the engine; only with the no-op network
	EnginePorts    []*runtimeapi.PortMapping // host ports of the engine; only with the no-op network
	Foreign        bool                      // created by an older shim: there is no record label
	ResolvConfPath string
	HostsPath      string
	CgroupParent   string
	Runtime        string // the OCI runtime, as in HostConfig.Runtime
	// ExecOutput is the directory for the output of execs from the shim, "" if the pod's shim does
	// not know it.
	ExecOutput string
	Plugged    Plugged
	Own        PodResources
	Stale      bool // from the engine's list alone: no process, times or paths
}

// PodResources are the resources of the pod as a whole in RunPodSandbox. The kubelet manages the
// pod's control group; the runtime only records them.
type PodResources struct {
	Overhead  *runtimeapi.LinuxContainerResources `json:"overhead,omitempty"`
	Resources *runtimeapi.LinuxContainerResources `json:"resources,omitempty"`
}

// Ready reports whether the sandbox is READY in terms of the CRI. A pause container that was
// started again (docker restart) has new namespaces: the pod's containers are still in the old
// ones, or have exited with them. The kubelet replaces such a pod.
func (s *Sandbox) Ready() bool { return s.Running && !s.Restarted }

// UsesShim reports whether the pod runs under this project's containerd shim.
func (s *Sandbox) UsesShim() bool { return s.Runtime == annotation.Runtime }

// HostNetwork reports whether the pod uses the node's network namespace.
func (s *Sandbox) HostNetwork() bool {
	return s.Namespaces.GetNetwork() == runtimeapi.NamespaceMode_NODE
}

// The engine's network modes of sandboxes with a namespace from the engine.
const (
	NetworkNone   = "none"   // this program connects the pod
	NetworkBridge = "bridge" // the engine connects the pod
)

// NetworkMode returns the engine's network mode for sandboxes.
func NetworkMode(isConnectedByUs bool) string {
	if isConnectedByUs {
		return NetworkNone
	}
	return NetworkBridge
}

// IsWithoutNetwork reports whether the engine created the pod's network namespace without
// connecting it.
func (s *Sandbox) IsWithoutNetwork() bool { return s.NetworkMode == NetworkNone }

// EngineNetwork reports whether the engine connects the pod, as with the no-op network.
func (s *Sandbox) EngineNetwork() bool {
	return !s.HostNetwork() && !s.OwnNetNS && s.NetworkMode != "" && !s.IsWithoutNetwork()
}

// PauseImage is the image of pause containers.
type PauseImage struct {
	Source string // a name or an ID that the engine accepts
	Name   string // for users
	// Seccomp is a profile that is stricter than the engine's default, "" for none.
	Seccomp string
}
