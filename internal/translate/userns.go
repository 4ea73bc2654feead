package translate

import (
	"path"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/shim/annotation"
)

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

// podUserNS returns the user namespace of a pod, nil for the node's.
func podUserNS(o *runtimeapi.NamespaceOption) *runtimeapi.UserNamespace {
	if u := o.GetUsernsOptions(); u != nil && u.GetMode() == runtimeapi.NamespaceMode_POD {
		return u
	}
	return nil
}

// shimUserNS describes a user namespace to the shim. validate.Request has checked that it has one
// mapping of users and one of groups.
func shimUserNS(u *runtimeapi.UserNamespace) *annotation.UserNS {
	if u == nil {
		return nil
	}

	ids := func(m *runtimeapi.IDMapping) annotation.IDs {
		return annotation.IDs{First: m.GetHostId(), Size: m.GetLength()}
	}

	return &annotation.UserNS{UIDs: ids(u.GetUids()[0]), GIDs: ids(u.GetGids()[0])}
}

// mappedMounts returns the targets of the mounts with mapped owners.
func mappedMounts(cfg *runtimeapi.ContainerConfig) []string {
	var out []string
	for _, m := range cfg.GetMounts() {
		if len(m.GetUidMappings())+len(m.GetGidMappings()) > 0 {
			out = append(out, path.Clean(m.GetContainerPath()))
		}
	}
	return out
}

// readMappings returns the mappings of users and groups of a container, and the targets of the
// mounts with mapped owners.
func readMappings(h *container.HostConfig) (uids, gids []*runtimeapi.IDMapping, targets []string) {
	want := readAnnotation(h)
	if want.UserNS == nil {
		return nil, nil, nil
	}

	list := func(ids annotation.IDs) []*runtimeapi.IDMapping {
		return []*runtimeapi.IDMapping{{HostId: ids.First, Length: ids.Size}}
	}

	return list(want.UserNS.UIDs), list(want.UserNS.GIDs), want.IDMapped
}
