package translate

import runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

// An engine with userns-remap runs containers in a user namespace, where root is an unprivileged
// user of the node. In it the engine rejects the node's network and PIDs and all privileges. The
// engine can also run a container in the node's user namespace. All containers of a pod must share
// one user namespace: only the user namespace that owns a network namespace may mount /sys in it
// (user_namespaces(7)).

// hostUsers is HostConfig.UsernsMode of a container in the node's user namespace.
const hostUsers = "host"

// needsHostUsers reports whether a pod must run in the node's user namespace. Kubernetes requires
// hostUsers: true for the same pods.
func needsHostUsers(sc *runtimeapi.LinuxSandboxSecurityContext) bool {
	ns := sc.GetNamespaceOptions()
	return sc.GetPrivileged() ||
		ns.GetNetwork() == runtimeapi.NamespaceMode_NODE ||
		ns.GetPid() == runtimeapi.NamespaceMode_NODE ||
		ns.GetIpc() == runtimeapi.NamespaceMode_NODE
}
