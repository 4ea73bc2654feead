package validate

import (
	"fmt"
	"math"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// userns checks the user namespace of a pod (CRI UserNamespace). The modes are POD and NODE. A
// namespace has one mapping of users and one of groups, from 0 on and without root of the node.
func (p *problems) userns(field string, o *runtimeapi.NamespaceOption) {
	u := o.GetUsernsOptions()
	if u == nil {
		return
	}

	own := field + ".userns_options"
	enum(p, own+".mode", runtimeapi.NamespaceMode_name, u.GetMode())
	switch u.GetMode() {
	case runtimeapi.NamespaceMode_NODE:
		if len(u.GetUids())+len(u.GetGids()) > 0 {
			p.add(own, "mode NODE has no mappings")
		}
		return
	case runtimeapi.NamespaceMode_POD:
	default:
		p.add(own+".mode", "%v is not allowed, it must be POD or NODE", u.GetMode())
		return
	}

	p.idMapping(own+".uids", u.GetUids())
	p.idMapping(own+".gids", u.GetGids())
	for name, mode := range map[string]runtimeapi.NamespaceMode{
		"network": o.GetNetwork(),
		"pid":     o.GetPid(),
		"ipc":     o.GetIpc(),
	} {
		if mode == runtimeapi.NamespaceMode_NODE {
			p.add(field+"."+name, "NODE is not allowed in a pod with a user namespace")
		}
	}
}

// idMapping checks the mapping of users or groups of a pod.
func (p *problems) idMapping(field string, all []*runtimeapi.IDMapping) {
	if len(all) != 1 || all[0] == nil {
		p.add(field, "%d mappings, it must be one", len(all))
		return
	}

	m := all[0]
	switch {
	case m.GetContainerId() != 0:
		p.add(field+"[0].container_id", "%d must be 0: root must be mapped", m.GetContainerId())
	case m.GetHostId() == 0:
		p.add(field+"[0].host_id", "root of the node must not be mapped")
	case m.GetLength() == 0 || uint64(m.GetHostId())+uint64(m.GetLength()) > math.MaxUint32:
		p.add(field+"[0].length", "%d IDs from %d on cannot be mapped", m.GetLength(), m.GetHostId())
	}
}

// hasUserNS reports whether a pod has a user namespace.
func hasUserNS(o *runtimeapi.NamespaceOption) bool {
	return o.GetUsernsOptions() != nil && o.GetUsernsOptions().GetMode() == runtimeapi.NamespaceMode_POD
}

// usernsSupport rejects a pod with a user namespace where the shim cannot create it.
func (p *problems) usernsSupport(r *runtimeapi.RunPodSandboxRequest, h model.Host) {
	if !hasUserNS(r.GetConfig().GetLinux().GetSecurityContext().GetNamespaceOptions()) {
		return
	}

	field := securityField + ".namespace_options.userns_options"
	switch {
	case r.GetRuntimeHandler() != "":
		p.add(field, "runtime handler %s has no user namespaces; set hostUsers: true", r.GetRuntimeHandler())
	case h.UserNSProblem() != "":
		p.add(field, "user namespaces are not supported on this runtime: %s; set hostUsers: true", h.UserNSProblem())
	}
}

// containerUserNS checks the user namespace of a container and its mounts against its pod's.
func (p *problems) containerUserNS(cfg *runtimeapi.ContainerConfig, sb *model.Sandbox) {
	pod := sb.Namespaces.GetUsernsOptions()
	own := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if own != nil && (own.GetMode() != pod.GetMode() && (pod != nil || hasMode(own, runtimeapi.NamespaceMode_POD)) ||
		hasMode(own, runtimeapi.NamespaceMode_POD) && !isSameMapping(own, pod)) {
		p.add(securityField+".namespace_options.userns_options", "it differs from the pod's")
	}

	for i, m := range cfg.GetMounts() {
		if len(m.GetUidMappings())+len(m.GetGidMappings()) == 0 {
			continue
		}
		mapping := &runtimeapi.UserNamespace{Uids: m.GetUidMappings(), Gids: m.GetGidMappings()}
		if pod == nil || !isSameMapping(mapping, pod) {
			p.add(fmt.Sprintf("config.mounts[%d].uidMappings", i), "the mappings differ from those of the pod")
		}
	}
}

func hasMode(u *runtimeapi.UserNamespace, mode runtimeapi.NamespaceMode) bool {
	return u.GetMode() == mode
}

func isSameMapping(a, b *runtimeapi.UserNamespace) bool {
	isSame := func(a, b *runtimeapi.IDMapping) bool {
		return a.GetContainerId() == b.GetContainerId() && a.GetHostId() == b.GetHostId() &&
			a.GetLength() == b.GetLength()
	}
	return slices.EqualFunc(a.GetUids(), b.GetUids(), isSame) && slices.EqualFunc(a.GetGids(), b.GetGids(), isSame)
}
