package spec

import (
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// containerResources sets the limits that Docker knows; kernelLimits has the others.
func containerResources(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	r := cfg.GetLinux().GetResources()
	devices := c.Host.Resources
	c.Host.Resources, c.Warnings = createResources(r)
	c.Host.Devices, c.Host.DeviceRequests = devices.Devices, devices.DeviceRequests
	c.Host.CgroupParent = o.Sandbox.CgroupParent
	c.Host.OomScoreAdj = o.Host.clampOOM(r.GetOomScoreAdj())
	return nil
}

const (
	// minMemory is the lowest memory limit in bytes that Docker accepts (linuxMinMemory, from
	// Engine 20.10 on). Container runtimes without such a minimum run pods with less.
	minMemory = 6 << 20
	// noMemoryLimit is what the kernel calls unlimited: the largest number of bytes in whole pages.
	// It lifts a limit; Docker's API refuses -1, and for 0 it changes nothing.
	noMemoryLimit = math.MaxInt64 &^ (1<<12 - 1)
)

// createResources are the limits of a container to be created, in Docker's terms, and what an
// administrator should know of them.
func createResources(r *runtimeapi.LinuxContainerResources) (container.Resources, []string) {
	out, warnings := resources(r)
	if out.Memory < 0 {
		out.Memory = 0 // a new container has no limit to lift
	}
	return out, warnings
}

// updateResources are the changed limits of a container, in Docker's terms. Docker does not pass on
// a MemorySwap of -1 in an update (libcontainerd, toContainerdResources), so cgroup v1 gets the
// number. A lifted memory limit lifts the limit of memory and swap, which cannot be lower there. On
// cgroup v2 the OCI runtime makes a limit of swap alone from the difference; a lifted memory limit
// leaves that as it is.
func updateResources(r *runtimeapi.LinuxContainerResources, h Host) (container.Resources, []string) {
	out, warnings := resources(r)
	if out.Memory < 0 {
		out.Memory, out.MemorySwap = noMemoryLimit, -1
	}
	if out.MemorySwap < 0 && (h.CgroupVersion != "2" || out.Memory > 0 && out.Memory < noMemoryLimit) {
		out.MemorySwap = noMemoryLimit
	}

	return out, warnings
}

// resources are limits in Docker's terms, memory -1 included. Docker would give as much swap as
// memory where only memory is limited; Kubernetes means none. Limits below Docker's minimum are
// raised to it.
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

	if out.Memory > 0 && out.MemorySwap >= 0 { // -1 is any amount of swap
		out.MemorySwap = max(out.MemorySwap, out.Memory)
	}

	return out, warnings
}

// memoryLimits checks that the limits of memory, and of memory and swap, agree with each other.
// isNew says that they are those of a container to be created.
func (p *problems) memoryLimits(field string, r *runtimeapi.LinuxContainerResources, isNew bool) {
	memory, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	switch {
	case swap <= 0:
	case memory < 0, memory == 0 && isNew:
		p.add(field+".memory_swap_limit_in_bytes", "%d needs a memory_limit_in_bytes; use -1 or 0 without one", swap)
	case swap < memory:
		p.add(field+".memory_swap_limit_in_bytes", "%d is the limit of memory and swap together, and below that of "+
			"memory, %d", swap, memory)
	}
}

// kernelLimits are the limits that Docker cannot be told. The OOM score is not among them: Docker
// takes it when a container is made.
func kernelLimits(field string, r *runtimeapi.LinuxContainerResources, h Host) (KernelLimits, error) {
	var l KernelLimits
	if len(r.GetUnified()) > 0 && h.CgroupVersion != "2" {
		return l, fmt.Errorf("%s.unified: this node has cgroup v1: %w", field, errdefs.ErrInvalidArgument)
	}

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

// NewUpdate translates UpdateContainerResources. Zero means "leave as it is", for CRI as for
// Docker; -1 lifts a CPU quota or a memory limit.
func NewUpdate(r *runtimeapi.LinuxContainerResources, h Host) (*Update, error) {
	l, err := kernelLimits("linux", r, h)
	if err != nil {
		return nil, err
	}

	if r.GetOomScoreAdj() != 0 {
		l.OOMScoreAdj = h.clampOOM(r.GetOomScoreAdj())
	}

	u := &Update{Kernel: l}
	u.Resources, u.Warnings = updateResources(r, h)

	return u, nil
}

// readResources are a container's resources as Docker knows them, and the others as they were asked
// for.
func readResources(h *container.HostConfig, l KernelLimits) *runtimeapi.ContainerResources {
	r := &runtimeapi.LinuxContainerResources{
		CpuPeriod:              h.CPUPeriod,
		CpuQuota:               h.CPUQuota,
		CpuShares:              h.CPUShares,
		MemoryLimitInBytes:     h.Memory,
		MemorySwapLimitInBytes: h.MemorySwap,
		CpusetCpus:             h.CpusetCpus,
		CpusetMems:             h.CpusetMems,
		OomScoreAdj:            int64(h.OomScoreAdj),
	}

	for _, limit := range []*int64{&r.MemoryLimitInBytes, &r.MemorySwapLimitInBytes} {
		if *limit >= noMemoryLimit {
			*limit = -1 // it was lifted
		}
	}

	setKernelLimits(r, l)

	return &runtimeapi.ContainerResources{Linux: r}
}

// setKernelLimits puts limits into a record.
func setKernelLimits(r *runtimeapi.LinuxContainerResources, l KernelLimits) {
	r.Unified, r.HugepageLimits = nil, nil
	for key, value := range l.Unified {
		if r.Unified == nil {
			r.Unified = map[string]string{}
		}
		r.Unified[string(key)] = value
	}

	for _, size := range slices.Sorted(maps.Keys(l.Hugepages)) {
		r.HugepageLimits = append(r.HugepageLimits,
			&runtimeapi.HugepageLimit{PageSize: string(size), Limit: l.Hugepages[size]})
	}
}

// Measured puts what the kernel says of a running container into its record, which is not shared
// yet. It replaces what was asked for.
func (c *Container) Measured(l KernelLimits) {
	r := c.Resources.GetLinux()
	r.OomScoreAdj = int64(l.OOMScoreAdj)
	setKernelLimits(r, l)
}
