package spec

import (
	"cmp"
	"fmt"
	"maps"
	"strings"

	"github.com/moby/moby/api/types/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A pod's network namespace is made by us before the pause, which joins it: Docker is told network
// mode "host", a mount of the namespace, and what the pause needs for the moment of joining; the
// pause then gives up every capability. What Docker would have done for a namespace of its own,
// namely net.* sysctls and the hosts file, is ours to do.

// netnsTarget is where the embedded pause looks for the namespace to join (engine/pause/src).
const netnsTarget = "/netns"

// EngineNetNS says why the engine must make the network namespace of a pod, "" if we can: its pause
// may not be able to join one.
func EngineNetNS(r *runtimeapi.RunPodSandboxRequest, h Host) (reason string) {
	sc := r.GetConfig().GetLinux().GetSecurityContext()
	switch {
	case h.MapsUsers():
		return "the engine runs with userns-remap"
	case h.Has("rootless"):
		return "the engine is rootless"
	case r.GetRuntimeHandler() != "" && r.GetRuntimeHandler() != h.DefaultRuntime:
		return fmt.Sprintf("runtime handler %q is not the engine's default runtime", r.GetRuntimeHandler())
	case SandboxSeccompFile(r.GetConfig()) != "":
		return "the pod has a seccomp profile of its own"
	case sc.GetApparmor().GetProfileType() == runtimeapi.SecurityProfile_Localhost:
		return "the pod has an AppArmor profile of its own"
	case sc.GetSelinuxOptions() != nil:
		return "the pod has SELinux options of its own"
	}

	return ""
}

// joinNetNS has the pause join a network namespace. It begins as root, for only root can, and
// becomes the pod's user itself, whose numbers are its arguments.
func joinNetNS(c *Create, netns string) {
	c.Host.NetworkMode = "host"
	c.Host.Mounts = append(c.Host.Mounts, mount.Mount{
		Type:     mount.TypeBind,
		Source:   netns,
		Target:   netnsTarget,
		ReadOnly: true,
	})

	c.Host.CapDrop, c.Host.CapAdd = []string{"ALL"}, []string{"SETPCAP", "SYS_ADMIN"}
	if c.Config.User != "" || len(c.Host.GroupAdd) > 0 {
		user, group, _ := strings.Cut(c.Config.User, ":")
		c.Config.Cmd = append([]string{cmp.Or(user, "0"), cmp.Or(group, "0")}, c.Host.GroupAdd...)
		c.Config.User, c.Host.GroupAdd = "", nil
		c.Host.CapAdd = append(c.Host.CapAdd, "SETGID", "SETUID")
	}

	c.Host.Sysctls = maps.Clone(c.Host.Sysctls) // the request's own
	maps.DeleteFunc(c.Host.Sysctls, func(k, _ string) bool { return isNet(k) })
}

func isNet(sysctl string) bool {
	return strings.HasPrefix(sysctl, "net.") || strings.HasPrefix(sysctl, "net/")
}

// NetSysctls are the sysctls of a pod that belong to its network namespace.
func NetSysctls(cfg *runtimeapi.PodSandboxConfig) map[string]string {
	out := map[string]string{}
	for k, v := range cfg.GetLinux().GetSysctls() {
		if isNet(k) {
			out[k] = v
		}
	}
	return out
}
