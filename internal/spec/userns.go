package spec

import (
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// An engine with userns-remap runs containers in a user namespace in which root is an unprivileged
// user of the node. It refuses the node's network and PIDs and all privileges to such containers,
// but it can run a container in the node's user namespace. All containers of a pod must be in the
// same one: only the user namespace that owns a network namespace may mount /sys in it
// (user_namespaces(7)).

// hostUsers is HostConfig.UsernsMode of a container in the node's user namespace.
const hostUsers = "host"

// MapsUsers says whether the engine runs with userns-remap.
func (h Host) MapsUsers() bool { return h.Has("userns") }

// needsHostUsers says whether a pod cannot run in a user namespace of its own. These are the pods
// whose hostUsers field Kubernetes demands to be true.
func needsHostUsers(sc *runtimeapi.LinuxSandboxSecurityContext) bool {
	ns := sc.GetNamespaceOptions()
	return sc.GetPrivileged() ||
		ns.GetNetwork() == runtimeapi.NamespaceMode_NODE ||
		ns.GetPid() == runtimeapi.NamespaceMode_NODE ||
		ns.GetIpc() == runtimeapi.NamespaceMode_NODE
}

// joinUsers puts a container into the user namespace of its pod. InvalidArgument for what the
// engine cannot run there; the kubelet says at the sandbox already what its containers need.
func joinUsers(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	const field = "config.linux.security_context"
	sc := cfg.GetLinux().GetSecurityContext()
	switch {
	case o.Sandbox.HostUsers:
		c.Host.UsernsMode = hostUsers
	case o.Host.MapsUsers() && sc.GetPrivileged():
		return fmt.Errorf("%s.privileged: the engine runs with userns-remap, and the sandbox is not privileged: %w",
			field, errdefs.ErrInvalidArgument)
	case o.Host.MapsUsers() && sc.GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_NODE:
		return fmt.Errorf("%s.namespace_options.pid: the engine runs with userns-remap, and the sandbox does not "+
			"share the node's PIDs: %w",
			field, errdefs.ErrInvalidArgument)
	}

	return nil
}
