package nri

import (
	"fmt"
	"maps"
	"path"
	"strings"
	"time"

	"github.com/containerd/nri/pkg/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// toPod returns a pod as plugins see it.
func toPod(p Pod) *api.PodSandbox {
	namespaces := podNamespaces(p.Sandbox)
	return &api.PodSandbox{
		Id:             string(p.ID),
		Name:           p.Metadata.GetName(),
		Uid:            p.Metadata.GetUid(),
		Namespace:      p.Metadata.GetNamespace(),
		Labels:         maps.Clone(p.Labels),
		Annotations:    maps.Clone(p.Annotations),
		RuntimeHandler: p.RuntimeHandler,
		Pid:            uint32(max(p.Pid, 0)),
		Ips:            p.IPs,
		Linux: &api.LinuxPodSandbox{
			PodOverhead:  toResources(p.Own.Overhead),
			PodResources: toResources(p.Own.Resources),
			CgroupParent: p.CgroupParent,
			CgroupsPath:  p.Host.cgroupsPath(p.CgroupParent, p.ID),
			Namespaces:   namespaces,
		},
	}
}

// cgroupsPath returns the control group of a container in the form of the OCI runtime
// specification, as Docker sets it.
func (h Host) cgroupsPath(parent string, id model.ContainerID) string {
	if h.UsesSystemd {
		return parent + ":docker:" + string(id)
	}
	if parent == "" {
		parent = "/docker"
	}
	return path.Join("/", parent, string(id))
}

// podNamespaces returns the namespaces of a pod. They have paths while its pause runs.
func podNamespaces(sb *model.Sandbox) []*api.LinuxNamespace {
	ns := sb.Namespaces
	var out []*api.LinuxNamespace
	add := func(mode runtimeapi.NamespaceMode, kind, file string) {
		if mode == runtimeapi.NamespaceMode_NODE {
			return
		}
		n := &api.LinuxNamespace{Type: kind}
		if sb.Pid > 0 {
			n.Path = fmt.Sprintf("/proc/%d/ns/%s", sb.Pid, file)
		}
		out = append(out, n)
	}

	add(ns.GetNetwork(), "network", "net")
	add(ns.GetNetwork(), "uts", "uts") // Docker has no pods; a pod with the node's network has its host name
	add(ns.GetIpc(), "ipc", "ipc")
	if ns.GetPid() == runtimeapi.NamespaceMode_POD {
		add(ns.GetPid(), "pid", "pid")
	}
	if ns.GetUsernsOptions().GetMode() == runtimeapi.NamespaceMode_POD && ns.GetUsernsOptions() != nil {
		add(runtimeapi.NamespaceMode_POD, "user", "user")
	}

	return out
}

// containerNamespaces returns the namespaces of a container: those of the pod, and its own.
func containerNamespaces(sb *model.Sandbox) []*api.LinuxNamespace {
	out := append(podNamespaces(sb), &api.LinuxNamespace{Type: "mount"})
	if sb.Namespaces.GetPid() == runtimeapi.NamespaceMode_CONTAINER {
		out = append(out, &api.LinuxNamespace{Type: "pid"})
	}
	return out
}

// toContainer returns a container as plugins see it. A container from the engine's list alone has
// no process and no limits.
func toContainer(p Pod, c *model.Container) *api.Container {
	out := &api.Container{
		Id:            string(c.ID),
		PodSandboxId:  string(c.SandboxID),
		Name:          c.Metadata.GetName(),
		State:         toState(c),
		Labels:        maps.Clone(c.Labels),
		Annotations:   maps.Clone(c.Annotations),
		Mounts:        toMounts(c.Mounts),
		Pid:           uint32(max(c.Pid, 0)),
		CreatedAt:     toTime(c.CreatedAt),
		StartedAt:     toTime(c.StartedAt),
		FinishedAt:    toTime(c.FinishedAt),
		ExitCode:      c.ExitCode,
		StatusReason:  c.Reason,
		StatusMessage: c.Message,
		User:          toUser(c.User.GetLinux()),
		Image:         &api.Image{Name: c.Image, ConfigDigest: string(c.ImageID), Digest: digest(c.ImageRef)},
		Linux: &api.LinuxContainer{
			Namespaces:  containerNamespaces(p.Sandbox),
			Resources:   toResources(c.Resources.GetLinux()),
			CgroupsPath: p.Host.cgroupsPath(p.CgroupParent, c.ID),
			OomScoreAdj: api.Int(int(c.Resources.GetLinux().GetOomScoreAdj())),
		},
	}
	if c.Process == nil {
		return out
	}

	out.Args, out.Env = c.Process.Args, c.Process.Env
	out.Linux.SeccompProfile = &api.SecurityProfile{ProfileType: profileTypes[c.Process.Seccomp]}
	addLimits(out.Linux, c.Process.Limits)
	for _, l := range c.Process.Rlimits {
		out.Rlimits = append(out.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
	}
	for _, d := range c.Process.Devices {
		out.Linux.Devices = append(out.Linux.Devices, &api.LinuxDevice{Path: d.ContainerPath})
	}

	return out
}

// addLimits adds limits that the CRI does not have.
func addLimits(l *api.LinuxContainer, limits model.PluginResources) {
	if limits == (model.PluginResources{}) {
		return
	}
	if l.Resources == nil {
		l.Resources = &api.LinuxResources{}
	}

	if limits.PidsLimit > 0 {
		l.Resources.Pids = &api.LinuxPids{Limit: limits.PidsLimit}
	}
	if limits.MemoryReservation > 0 {
		if l.Resources.Memory == nil {
			l.Resources.Memory = &api.LinuxMemory{}
		}
		l.Resources.Memory.Reservation = api.Int64(limits.MemoryReservation)
	}
}

// profileTypes are the kinds of security profiles of the CRI in terms of NRI.
var profileTypes = map[runtimeapi.SecurityProfile_ProfileType]api.SecurityProfile_ProfileType{
	runtimeapi.SecurityProfile_RuntimeDefault: api.SecurityProfile_RUNTIME_DEFAULT,
	runtimeapi.SecurityProfile_Unconfined:     api.SecurityProfile_UNCONFINED,
	runtimeapi.SecurityProfile_Localhost:      api.SecurityProfile_LOCALHOST,
}

// digest returns the digest of an image reference, "" for none.
func digest(ref string) string {
	_, d, _ := strings.Cut(ref, "@")
	return d
}

func toState(c *model.Container) api.ContainerState {
	switch c.State {
	case runtimeapi.ContainerState_CONTAINER_CREATED:
		return api.ContainerState_CONTAINER_CREATED
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		return api.ContainerState_CONTAINER_RUNNING
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		return api.ContainerState_CONTAINER_STOPPED
	}
	return api.ContainerState_CONTAINER_UNKNOWN
}

func toTime(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func toUser(u *runtimeapi.LinuxContainerUser) *api.User {
	if u == nil {
		return nil
	}

	out := &api.User{Uid: uint32(u.GetUid()), Gid: uint32(u.GetGid())}
	for _, g := range u.GetSupplementalGroups() {
		out.AdditionalGids = append(out.AdditionalGids, uint32(g))
	}

	return out
}

// propagations are the names of the OCI runtime specification.
var propagations = map[runtimeapi.MountPropagation]string{
	runtimeapi.MountPropagation_PROPAGATION_PRIVATE:           "rprivate",
	runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER: "rslave",
	runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:     "rshared",
}

func toMounts(mounts []*runtimeapi.Mount) []*api.Mount {
	var out []*api.Mount
	for _, m := range mounts {
		access := "rw"
		switch {
		case m.GetRecursiveReadOnly():
			access = "rro"
		case m.GetReadonly():
			access = "ro"
		}

		out = append(out, &api.Mount{
			Destination: m.GetContainerPath(),
			Type:        "bind",
			Source:      m.GetHostPath(),
			Options:     append([]string{"rbind", propagations[m.GetPropagation()], access}, m.GetMountOptions()...),
		})
	}

	return out
}
