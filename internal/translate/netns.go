package translate

import (
	"cmp"
	"fmt"
	"maps"
	"strings"

	"github.com/moby/moby/api/types/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// This program creates a pod's network namespace before the pause container, and the pause process
// joins it. Docker's request has network mode "host", a mount of the namespace, and the
// capabilities for joining. The pause process drops all capabilities afterwards. Docker applies
// net.* sysctls and writes the hosts file only for its own namespaces, so this program does both.

// netnsTarget is the path of the namespace in the pause container (engine/pause/src).
const netnsTarget = "/netns"

// EngineNetNS returns the reason if the engine must create the network namespace of a pod, because
// the pause process may not be able to join one. It returns "" otherwise.
func EngineNetNS(r *runtimeapi.RunPodSandboxRequest, h model.Host) (reason string) {
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
	case podUserNS(sc.GetNamespaceOptions()) != nil: // only the owner of a network namespace mounts its /sys
		return "the pod has a user namespace"
	}

	return ""
}

// joinNetNS makes the pause process join a network namespace. Only root can join, so the process
// starts as root and switches to the pod's user, with the numbers in its arguments.
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

	c.Host.Sysctls = withoutNetSysctls(c.Host.Sysctls)
}

// withoutNetSysctls returns a copy without the sysctls of network namespaces.
func withoutNetSysctls(all map[string]string) map[string]string {
	out := maps.Clone(all)
	maps.DeleteFunc(out, func(k, _ string) bool { return model.IsNetSysctl(k) })
	return out
}

// NetSysctls returns the sysctls of a pod's network namespace.
func NetSysctls(cfg *runtimeapi.PodSandboxConfig) map[string]string {
	out := map[string]string{}
	for k, v := range cfg.GetLinux().GetSysctls() {
		if model.IsNetSysctl(k) {
			out[k] = v
		}
	}
	return out
}
