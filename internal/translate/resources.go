package translate

import (
	"fmt"
	"math"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// setResources sets Docker's limits. kernelLimits returns the others.
func setResources(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) {
	r := cfg.GetLinux().GetResources()
	devices := c.Host.Resources
	c.Host.Resources, c.Warnings = createResources(r)
	c.Host.Devices, c.Host.DeviceRequests = devices.Devices, devices.DeviceRequests
	c.Host.CgroupParent = o.Sandbox.CgroupParent
	c.Host.OomScoreAdj = o.Host.ClampOOMScore(r.GetOomScoreAdj())
}

const (
	// minMemory is Docker's lowest memory limit in bytes (linuxMinMemory, from Engine 20.10 on).
	// Other container runtimes have no such minimum.
	minMemory = 6 << 20
	// noMemoryLimit means unlimited for the kernel: the largest number of bytes in whole pages. It
	// lifts a limit: Docker's API rejects -1, and 0 changes nothing.
	noMemoryLimit = math.MaxInt64 &^ (1<<12 - 1)
)

// createResources returns the limits of a new container in Docker's terms, and warnings for the
// administrator.
func createResources(r *runtimeapi.LinuxContainerResources) (container.Resources, []string) {
	out, warnings := resources(r)
	if out.Memory < 0 {
		out.Memory = 0 // a new container has no limit to lift
	}
	return out, warnings
}

// updateResources returns changed limits of a container in Docker's terms. Docker ignores a
// MemorySwap of -1 in an update (libcontainerd, toContainerdResources), so cgroup v1 gets
// noMemoryLimit. On cgroup v1 the limit of memory and swap cannot be below the memory limit, so
// both are lifted together. On cgroup v2 the OCI runtime derives a limit of swap alone from the
// difference, and lifting the memory limit does not change it.
func updateResources(r *runtimeapi.LinuxContainerResources, h model.Host) (container.Resources, []string) {
	out, warnings := resources(r)
	if out.Memory < 0 {
		out.Memory, out.MemorySwap = noMemoryLimit, -1
	}
	if out.MemorySwap < 0 && (h.CgroupVersion != "2" || out.Memory > 0 && out.Memory < noMemoryLimit) {
		out.MemorySwap = noMemoryLimit
	}

	return out, warnings
}

// resources returns limits in Docker's terms, except for a memory limit of -1. If only memory is
// limited, Docker would allow as much swap as memory and Kubernetes means none. Limits below
// Docker's minimum are raised to it.
func resources(r *runtimeapi.LinuxContainerResources) (out container.Resources, warnings []string) {
	out = container.Resources{
		CPUShares:  r.GetCpuShares(),
		CPUPeriod:  r.GetCpuPeriod(),
		CPUQuota:   r.GetCpuQuota(),
		Memory:     r.GetMemoryLimitInBytes(),
		MemorySwap: r.GetMemorySwapLimitInBytes(),
		CpusetCpus: r.GetCpusetCpus(),
		CpusetMems: r.GetCpusetMems(),
	}
	if out.Memory > 0 && out.Memory < minMemory {
		warnings = append(warnings, fmt.Sprintf("memory limit of %d bytes raised to %d, the minimum of Docker Engine",
			out.Memory, minMemory))
		out.Memory = minMemory
	}

	if out.Memory > 0 && out.MemorySwap >= 0 { // -1 means unlimited swap
		out.MemorySwap = max(out.MemorySwap, out.Memory)
	}

	return out, warnings
}

// kernelLimits returns the limits without a field in Docker's API, except for the OOM score: Docker
// sets it at creation. It parses keys and page sizes into checked types, which cannot fail after
// validate.Request.
func kernelLimits(field string, r *runtimeapi.LinuxContainerResources) (model.KernelLimits, error) {
	var l model.KernelLimits
	for key, value := range r.GetUnified() {
		k, err := model.ParseUnifiedKey(key)
		if err != nil {
			return l, fmt.Errorf("%s.unified: %w", field, err)
		}

		if l.Unified == nil {
			l.Unified = map[model.UnifiedKey]string{}
		}

		l.Unified[k] = value
	}

	for i, p := range r.GetHugepageLimits() {
		size, err := model.ParsePageSize(p.GetPageSize())
		if err != nil {
			return l, fmt.Errorf("%s.hugepage_limits[%d].page_size: %w", field, i, err)
		}

		if l.Hugepages == nil {
			l.Hugepages = map[model.PageSize]uint64{}
		}

		l.Hugepages[size] = p.GetLimit()
	}

	return l, nil
}

// NewUpdate translates the resources of UpdateContainerResources. They must have passed
// validate.Request and validate.Update. Zero means unchanged, in the CRI and in Docker. -1 lifts a
// CPU quota or a memory limit.
func NewUpdate(r *runtimeapi.LinuxContainerResources, h model.Host) (*Update, error) {
	l, err := kernelLimits("linux", r)
	if err != nil {
		return nil, err
	}

	if r.GetOomScoreAdj() != 0 {
		l.OOMScoreAdj = h.ClampOOMScore(r.GetOomScoreAdj())
	}

	u := &Update{Kernel: l}
	u.Resources, u.Warnings = updateResources(r, h)

	return u, nil
}

// Add adds resources of NRI plugins.
func (u *Update) Add(r model.PluginResources) {
	if r.PidsLimit != 0 {
		u.Resources.PidsLimit = &r.PidsLimit
	}
	u.Resources.MemoryReservation = r.MemoryReservation
}
