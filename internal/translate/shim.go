package translate

import (
	"maps"
	"path"
	"strings"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/shim/annotation"
)

// Containers of this project's containerd shim have one annotation for everything that Docker's API
// cannot express. The shim applies it. See docs/adr/0011.

// ShimProblem returns the reason why an engine cannot run containers under the shim, "" if a trial
// must decide.
func ShimProblem(h model.Host) string {
	switch {
	case !h.AtLeast("1.43"):
		return "Docker Engine " + h.EngineVersion + " has no annotations; Engine 24 has"
	case h.Has("rootless"):
		return "the engine is rootless"
	case h.MapsUsers():
		return "the engine runs with userns-remap"
	case !h.DefaultIsRunc:
		return "the engine's default runtime is " + h.DefaultRuntime + ", not runc"
	}

	return ""
}

// ShimTrialName is the name of the container of NewShimTrial.
const ShimTrialName = "cri-dockerd-shim-trial"

// UserNSTrialName is the name of the container of NewUserNSTrial.
const UserNSTrialName = "cri-dockerd-userns-trial"

// NewUserNSTrial returns a container that starts only if the shim can run containers in user
// namespaces.
func NewUserNSTrial(image model.PauseImage) (*Create, error) {
	c, err := NewShimTrial(image)
	if err != nil {
		return nil, err
	}

	const first, size = 1 << 30, 65536
	ids := annotation.IDs{First: first, Size: size}
	c.Name, c.Host.NetworkMode = UserNSTrialName, "none"

	return c, annotate(c, annotation.Container{
		Sandbox: &annotation.Sandbox{},
		UserNS:  &annotation.UserNS{UIDs: ids, GIDs: ids},
	})
}

// NewShimTrial returns a container that starts only if containerd finds the shim.
func NewShimTrial(image model.PauseImage) (*Create, error) {
	c := &Create{
		Name:   ShimTrialName,
		Config: &container.Config{Image: image.Source},
		Host: &container.HostConfig{
			LogConfig:      container.LogConfig{Type: "none"},
			RestartPolicy:  container.RestartPolicy{Name: container.RestartPolicyDisabled},
			NetworkMode:    "host",
			Runtime:        annotation.Runtime,
			ReadonlyRootfs: true,
			CapDrop:        []string{"ALL"},
			SecurityOpt:    []string{"no-new-privileges"},
			Init:           new(bool),
		},
	}

	return c, annotate(c, annotation.Container{Sandbox: pauseOf(image)})
}

// pauseOf returns the shim's description of a pause. Only the embedded image has a program that
// needs nothing but its root; OCI runtimes start the others.
func pauseOf(image model.PauseImage) *annotation.Sandbox {
	if image.Seccomp == "" {
		return nil
	}
	return &annotation.Sandbox{}
}

// annotate adds the annotation for the shim, unless it is empty.
func annotate(c *Create, want annotation.Container) error {
	if want.IsZero() {
		return nil
	}

	text, err := want.Encode()
	if err != nil {
		return err
	}

	c.Host.Annotations = maps.Clone(c.Host.Annotations)
	if c.Host.Annotations == nil {
		c.Host.Annotations = map[string]string{}
	}
	c.Host.Annotations[annotation.Key] = text

	return nil
}

// usesShim reports whether a new sandbox runs under the shim. A runtime handler of the request
// names another runtime.
func (o SandboxOptions) usesShim() bool { return o.Host.Shim.IsActive() && o.RuntimeHandler == "" }

// runtime returns Docker's name of the sandbox's runtime, "" for the engine's default.
func (o SandboxOptions) runtime() string {
	if o.usesShim() {
		return annotation.Runtime
	}
	return o.RuntimeHandler
}

// shimSandbox describes a pause to the shim. The shim joins the network namespace, so the pause
// needs neither capabilities nor a mount (compare joinNetNS).
func shimSandbox(c *Create, cfg *runtimeapi.PodSandboxConfig, o SandboxOptions, join bool) error {
	sc := cfg.GetLinux().GetSecurityContext()
	want := annotation.Container{Sandbox: pauseOf(o.Image), Output: o.Host.Shim.OutputDirectory}
	if o.Plugins && o.Host.Shim.Adjustments != "" {
		want.Adjustments = &annotation.Adjustments{Directory: o.Host.Shim.Adjustments, IsPod: true}
	}
	if userns := podUserNS(sc.GetNamespaceOptions()); userns != nil {
		want.UserNS, want.Sandbox = shimUserNS(userns), &annotation.Sandbox{}
		c.Host.Privileged = false // privileges of a pod are for its containers
		c.Host.CapDrop = []string{"ALL"}
	}
	if sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Strict {
		want.StrictGroups = groupIDs(sc.GetSupplementalGroups())
	}

	if join {
		want.Sandbox = &annotation.Sandbox{NetNS: o.NetNS}
		c.Host.NetworkMode = "host"
		c.Host.Privileged = false // privileges of a pod are for its containers
		c.Host.CapDrop = []string{"ALL"}
		c.Host.Sysctls = withoutNetSysctls(c.Host.Sysctls)
	}

	return annotate(c, want)
}

// shimContainer describes a container to the shim.
func shimContainer(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	userns := o.Sandbox.Namespaces.GetUsernsOptions()
	sc := cfg.GetLinux().GetSecurityContext()
	limits, err := kernelLimits("config.linux.resources", cfg.GetLinux().GetResources())
	if err != nil {
		return err
	}

	want := annotation.Container{UserNS: shimUserNS(userns), Output: o.Sandbox.ExecOutput}
	if dir := o.Sandbox.Plugged.Directory; o.Plugins && dir != "" { // the server of an older pod would reject it
		want.Adjustments = &annotation.Adjustments{Directory: dir}
	}
	if userns != nil {
		want.IDMapped = mappedMounts(cfg)
	}
	if sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Strict {
		want.StrictGroups = groupIDs(sc.GetSupplementalGroups())
	}

	for _, name := range sc.GetCapabilities().GetAddAmbientCapabilities() {
		name = "CAP_" + strings.TrimPrefix(strings.ToUpper(name), "CAP_")
		want.Ambient = append(want.Ambient, name)
		c.Host.CapAdd = append(c.Host.CapAdd, strings.TrimPrefix(name, "CAP_")) // all sets have it (CRI Capability)
	}

	for _, m := range cfg.GetMounts() {
		if options := m.GetMountOptions(); len(options) > 0 {
			if want.MountOptions == nil {
				want.MountOptions = map[string][]string{}
			}
			want.MountOptions[path.Clean(m.GetContainerPath())] = options
		}
		if m.GetRecursiveReadOnly() && m.GetImage().GetImage() == "" {
			want.RecursiveReadOnly = append(want.RecursiveReadOnly, path.Clean(m.GetContainerPath()))
		}
	}

	for key, value := range limits.Unified {
		if want.Unified == nil {
			want.Unified = map[string]string{}
		}
		want.Unified[string(key)] = value
	}

	for size, limit := range limits.Hugepages {
		if want.Hugepages == nil {
			want.Hugepages = map[string]uint64{}
		}
		want.Hugepages[string(size)] = limit
	}

	return annotate(c, want)
}

// readAnnotation returns the daemon's description of a container to the shim. It is zero for a
// container of another runtime.
func readAnnotation(h *container.HostConfig) annotation.Container {
	text := h.Annotations[annotation.Key]
	if h.Runtime != annotation.Runtime || text == "" {
		return annotation.Container{}
	}

	want, err := annotation.Parse(text)
	if err != nil {
		return annotation.Container{} // the shim refused it
	}

	return want
}

// groupIDs returns groups in the kernel's type. validate.Request checks their range.
func groupIDs(ids []int64) *[]uint32 {
	out := make([]uint32, 0, len(ids))
	for _, id := range ids {
		out = append(out, uint32(id))
	}
	return &out
}
