package bundle

import (
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// generator edits a spec for NRI's generator (generate.UnderlyingGenerator). Its spec has a process
// and a Linux part.
type generator struct{ spec *specs.Spec }

// Spec returns the edited spec.
func (g *generator) Spec() *specs.Spec { return g.spec }

func (g *generator) hooks() *specs.Hooks {
	if g.spec.Hooks == nil {
		g.spec.Hooks = &specs.Hooks{}
	}
	return g.spec.Hooks
}

func (g *generator) resources() *specs.LinuxResources {
	if g.spec.Linux.Resources == nil {
		g.spec.Linux.Resources = &specs.LinuxResources{}
	}
	return g.spec.Linux.Resources
}

func (g *generator) cpu() *specs.LinuxCPU {
	r := g.resources()
	if r.CPU == nil {
		r.CPU = &specs.LinuxCPU{}
	}
	return r.CPU
}

func (g *generator) memory() *specs.LinuxMemory {
	r := g.resources()
	if r.Memory == nil {
		r.Memory = &specs.LinuxMemory{}
	}
	return r.Memory
}

// AddAnnotation sets an annotation.
func (g *generator) AddAnnotation(key, value string) {
	if g.spec.Annotations == nil {
		g.spec.Annotations = map[string]string{}
	}
	g.spec.Annotations[key] = value
}

// RemoveAnnotation removes an annotation.
func (g *generator) RemoveAnnotation(key string) { delete(g.spec.Annotations, key) }

// AddDevice adds a device, or replaces that of its path.
func (g *generator) AddDevice(d specs.LinuxDevice) {
	g.RemoveDevice(d.Path)
	g.spec.Linux.Devices = append(g.spec.Linux.Devices, d)
}

// RemoveDevice removes the device of a path.
func (g *generator) RemoveDevice(path string) {
	g.spec.Linux.Devices = slices.DeleteFunc(g.spec.Linux.Devices, func(d specs.LinuxDevice) bool {
		return d.Path == path
	})
}

// AddLinuxResourcesDevice appends a rule of the device controller.
func (g *generator) AddLinuxResourcesDevice(allow bool, kind string, major, minor *int64, access string) {
	r := g.resources()
	r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{
		Allow:  allow,
		Type:   kind,
		Major:  major,
		Minor:  minor,
		Access: access,
	})
}

// AddOrReplaceLinuxNamespace sets a namespace. Without a path it is new.
func (g *generator) AddOrReplaceLinuxNamespace(kind, path string) error {
	t, err := namespaceType(kind)
	if err != nil {
		return err
	}
	g.spec.Linux.Namespaces = replaceNamespace(g.spec.Linux.Namespaces, t, path)
	return nil
}

// RemoveLinuxNamespace lets the container use the node's namespace.
func (g *generator) RemoveLinuxNamespace(kind string) error {
	t, err := namespaceType(kind)
	if err != nil {
		return err
	}
	g.spec.Linux.Namespaces = slices.DeleteFunc(g.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		return n.Type == t
	})
	return nil
}

// namespaceType returns the type of a namespace by its name in the OCI runtime specification.
func namespaceType(name string) (specs.LinuxNamespaceType, error) {
	known := []specs.LinuxNamespaceType{
		specs.CgroupNamespace, specs.IPCNamespace, specs.MountNamespace, specs.NetworkNamespace, specs.PIDNamespace,
		specs.TimeNamespace, specs.UserNamespace, specs.UTSNamespace,
	}
	if t := specs.LinuxNamespaceType(name); slices.Contains(known, t) {
		return t, nil
	}
	return "", fmt.Errorf("namespace %q is unknown", name)
}

// AddPreStartHook appends a hook.
func (g *generator) AddPreStartHook(h specs.Hook) {
	g.hooks().Prestart = append(g.hooks().Prestart, h) //nolint:staticcheck // NRI has hooks of this kind
}

// AddPostStartHook appends a hook.
func (g *generator) AddPostStartHook(h specs.Hook) {
	g.hooks().Poststart = append(g.hooks().Poststart, h)
}

// AddPostStopHook appends a hook.
func (g *generator) AddPostStopHook(h specs.Hook) { g.hooks().Poststop = append(g.hooks().Poststop, h) }

// AddProcessEnv sets an environment variable.
func (g *generator) AddProcessEnv(name, value string) {
	p := g.spec.Process
	p.Env = slices.DeleteFunc(p.Env, func(v string) bool { return strings.HasPrefix(v, name+"=") })
	p.Env = append(p.Env, name+"="+value)
}

// ClearProcessEnv removes all environment variables.
func (g *generator) ClearProcessEnv() { g.spec.Process.Env = nil }

// SetProcessArgs sets the command.
func (g *generator) SetProcessArgs(args []string) { g.spec.Process.Args = args }

// SetProcessOOMScoreAdj sets the OOM score.
func (g *generator) SetProcessOOMScoreAdj(score int) { g.spec.Process.OOMScoreAdj = &score }

// Mounts returns the mounts.
func (g *generator) Mounts() []specs.Mount { return g.spec.Mounts }

// AddMount appends a mount.
func (g *generator) AddMount(m specs.Mount) { g.spec.Mounts = append(g.spec.Mounts, m) }

// RemoveMount removes the mounts at a path.
func (g *generator) RemoveMount(path string) {
	g.spec.Mounts = slices.DeleteFunc(g.spec.Mounts, func(m specs.Mount) bool { return m.Destination == path })
}

// ClearMounts removes all mounts.
func (g *generator) ClearMounts() { g.spec.Mounts = nil }

// SetLinuxRootPropagation sets the mount propagation of the root.
func (g *generator) SetLinuxRootPropagation(propagation string) error {
	g.spec.Linux.RootfsPropagation = propagation
	return nil
}

// AddLinuxSysctl sets a sysctl.
func (g *generator) AddLinuxSysctl(key, value string) {
	if g.spec.Linux.Sysctl == nil {
		g.spec.Linux.Sysctl = map[string]string{}
	}
	g.spec.Linux.Sysctl[key] = value
}

// RemoveLinuxSysctl removes a sysctl.
func (g *generator) RemoveLinuxSysctl(key string) { delete(g.spec.Linux.Sysctl, key) }

// SetLinuxCgroupsPath sets the control group.
func (g *generator) SetLinuxCgroupsPath(path string) { g.spec.Linux.CgroupsPath = path }

// AddLinuxResourcesHugepageLimit sets the limit of a page size, in bytes.
func (g *generator) AddLinuxResourcesHugepageLimit(size string, limit uint64) {
	r := g.resources()
	r.HugepageLimits = slices.DeleteFunc(r.HugepageLimits, func(l specs.LinuxHugepageLimit) bool {
		return l.Pagesize == size
	})
	r.HugepageLimits = append(r.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: limit})
}

// AddLinuxResourcesUnified sets a file of cgroup v2.
func (g *generator) AddLinuxResourcesUnified(key, value string) {
	r := g.resources()
	if r.Unified == nil {
		r.Unified = map[string]string{}
	}
	r.Unified[key] = value
}

// SetLinuxResourcesCPUCpus sets the CPUs, a list such as 0-3,7.
func (g *generator) SetLinuxResourcesCPUCpus(cpus string) { g.cpu().Cpus = cpus }

// SetLinuxResourcesCPUMems sets the memory nodes.
func (g *generator) SetLinuxResourcesCPUMems(mems string) { g.cpu().Mems = mems }

// SetLinuxResourcesCPUPeriod sets the period of the CPU quota, in microseconds.
func (g *generator) SetLinuxResourcesCPUPeriod(period uint64) { g.cpu().Period = &period }

// SetLinuxResourcesCPUQuota sets the CPU quota, in microseconds.
func (g *generator) SetLinuxResourcesCPUQuota(quota int64) { g.cpu().Quota = &quota }

// SetLinuxResourcesCPURealtimePeriod sets the period of realtime scheduling, in microseconds.
func (g *generator) SetLinuxResourcesCPURealtimePeriod(period uint64) {
	g.cpu().RealtimePeriod = &period
}

// SetLinuxResourcesCPURealtimeRuntime sets the time of realtime scheduling, in microseconds.
func (g *generator) SetLinuxResourcesCPURealtimeRuntime(runtime int64) {
	g.cpu().RealtimeRuntime = &runtime
}

// SetLinuxResourcesCPUShares sets the CPU shares.
func (g *generator) SetLinuxResourcesCPUShares(shares uint64) { g.cpu().Shares = &shares }

// SetLinuxResourcesMemoryLimit sets the memory limit, in bytes.
func (g *generator) SetLinuxResourcesMemoryLimit(limit int64) { g.memory().Limit = &limit }

// SetLinuxResourcesMemorySwap sets the limit of memory and swap, in bytes.
func (g *generator) SetLinuxResourcesMemorySwap(limit int64) { g.memory().Swap = &limit }
