package validate

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

const securityField = "config.linux.security_context"

// Sandbox checks a new sandbox against the engine.
func Sandbox(r *runtimeapi.RunPodSandboxRequest, h model.Host) error {
	if err := RuntimeHandler("runtime_handler", r.GetRuntimeHandler(), h); err != nil {
		return err
	}

	p := &problems{}
	sc := r.GetConfig().GetLinux().GetSecurityContext()
	p.appArmorSupport("apparmor", sc.GetApparmor(), h)
	p.strictGroups(sc.GetSupplementalGroupsPolicy(), h.Shim.IsActive() && r.GetRuntimeHandler() == "")
	p.usernsSupport(r, h)

	return p.err
}

// Container checks a new container against its sandbox, its image and the engine.
func Container(cfg *runtimeapi.ContainerConfig, sb *model.Sandbox, image *model.Image, h model.Host) error {
	p := &problems{}
	if len(cfg.GetCommand()) == 0 && len(cfg.GetArgs()) == 0 && !image.Entrypoint && !image.Stale {
		p.add("config.command", "image %s has no command of its own", cfg.GetImage().GetImage())
	}

	sc := cfg.GetLinux().GetSecurityContext()
	p.cgroupVersion("config.linux.resources", cfg.GetLinux().GetResources(), h)
	p.userNamespace(sc, sb, h)
	p.containerUserNS(cfg, sb)
	profile, profileField := model.AppArmorProfile(sc)
	p.appArmorSupport(profileField, profile, h)
	for i, m := range cfg.GetMounts() {
		p.mountOnEngine(fmt.Sprintf("config.mounts[%d]", i), m, sb, h)
	}

	p.cdiSupport(model.CDIDevices(cfg), h)
	p.strictGroups(sc.GetSupplementalGroupsPolicy(), sb.UsesShim())
	p.ambient(sc.GetCapabilities(), sb.UsesShim())

	return p.err
}

// Update checks new limits of a container against the engine.
func Update(r *runtimeapi.LinuxContainerResources, h model.Host) error {
	p := &problems{}
	p.cgroupVersion("linux", r, h)
	return p.err
}

// RuntimeHandler checks that the engine has a runtime for a handler: a configured one or, from
// Engine 23 on, the name of a containerd shim.
func RuntimeHandler(field, handler string, h model.Host) error {
	p := &problems{}
	switch {
	case handler == "", slices.Contains(h.Runtimes, handler):
	case !shimPattern.MatchString(handler):
		p.add(field, "the engine has no runtime %q (it has: %s); add it to the engine's daemon.json", handler,
			strings.Join(h.Runtimes, ", "))
	case !h.AtLeast("1.42"):
		p.add(field, "Docker Engine %s cannot run containerd's shim %q; Engine 23 can", h.EngineVersion, handler)
	}

	// The engine reports a missing shim before the sandbox starts.
	return p.err
}

// shimPattern is the grammar of containerd's shim names. The program of io.containerd.kata.v2 is
// containerd-shim-kata-v2 (containerd, runtime v2).
var shimPattern = regexp.MustCompile(`^io\.containerd\.[a-zA-Z0-9_-]+\.v[0-9]+$`)

// ImageVolumes checks that images can be mounted at all: by the engine, or by this program from the
// directories of the graph driver overlay2. The error is FailedPrecondition and names no field.
func ImageVolumes(h model.Host) error {
	switch {
	case h.NativeImageVolumes():
		return nil
	case h.Has("rootless"), h.MapsUsers():
		return fmt.Errorf("image volumes need Engine 28 with containerd's image store where the engine maps user "+
			"IDs (rootless, userns-remap): %w", errdefs.ErrFailedPrecondition)
	case h.ContainerdStore:
		return fmt.Errorf("image volumes with containerd's image store need Docker Engine 28; this is %s: %w",
			h.EngineVersion, errdefs.ErrFailedPrecondition)
	case h.StorageDriver != "overlay2":
		return fmt.Errorf("image volumes need the storage driver overlay2 or containerd's image store of Engine 28; "+
			"this engine has %s: %w", h.StorageDriver, errdefs.ErrFailedPrecondition)
	}

	return nil
}

// cgroupVersion checks resources against the node's cgroup version.
func (p *problems) cgroupVersion(field string, r *runtimeapi.LinuxContainerResources, h model.Host) {
	if len(r.GetUnified()) > 0 && h.CgroupVersion != "2" {
		p.add(field+".unified", "this node has cgroup v1")
	}
}

// userNamespace checks a container against the user namespace of its pod. The kubelet announces at
// the sandbox that a container will be privileged or share the node's PIDs.
func (p *problems) userNamespace(sc *runtimeapi.LinuxContainerSecurityContext, sb *model.Sandbox, h model.Host) {
	if sb.HostUsers || !h.MapsUsers() {
		return
	}

	if sc.GetPrivileged() {
		p.add(securityField+".privileged", "the engine runs with userns-remap, and the sandbox is not privileged")
	}
	if sc.GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_NODE {
		p.add(securityField+".namespace_options.pid",
			"the engine runs with userns-remap, and the sandbox does not share the node's PIDs")
	}
}

// appArmorSupport checks that the engine applies a profile of this node. name is its field in the
// security context.
func (p *problems) appArmorSupport(name string, profile *runtimeapi.SecurityProfile, h model.Host) {
	if ref := model.LocalhostRef(profile); ref != "" && !h.Has("apparmor") {
		p.add(securityField+"."+name, "profile %q: AppArmor is not enabled on this node", ref)
	}
}

// mountOnEngine checks a mount against the engine. Docker relabels for SELinux only with the old
// string form of mounts, HostConfig.Binds, with colons as separators.
func (p *problems) mountOnEngine(field string, m *runtimeapi.Mount, sb *model.Sandbox, h model.Host) {
	if m.GetRecursiveReadOnly() && !h.RecursiveReadOnly() && !sb.UsesShim() {
		p.add(field+".recursive_read_only", "Docker Engine %s does not support it; Engine 25 does", h.EngineVersion)
	}

	if len(m.GetMountOptions()) > 0 && !sb.UsesShim() {
		p.add(field+".mount_options", "Docker cannot set %s on a bind mount", strings.Join(m.GetMountOptions(), ","))
	}

	if !m.GetSelinuxRelabel() || !h.Has("selinux") || m.GetImage().GetImage() != "" {
		return
	}
	if strings.Contains(m.GetHostPath()+m.GetContainerPath(), ":") {
		p.add(field, "Docker cannot relabel a path with a colon")
	}
	if m.GetRecursiveReadOnly() {
		p.add(field+".recursive_read_only", "Docker cannot combine it with selinux_relabel")
	}
}

// cdiSupport rejects CDI devices on an engine that would start the container without them.
func (p *problems) cdiSupport(devices []model.CDIDevice, h model.Host) {
	if len(devices) == 0 || h.CDI {
		return
	}

	var names []string
	for _, d := range devices {
		names = append(names, d.Name)
	}

	p.add(devices[0].Field, "Docker Engine %s has no CDI (%s); it needs Engine 25, where daemon.json may have to "+
		"enable it (\"features\": {\"cdi\": true})", h.EngineVersion, strings.Join(names, ", "))
}
