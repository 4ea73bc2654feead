package spec

import (
	"fmt"
	"maps"
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
	c.Host.Resources = resources(r)
	c.Host.Devices, c.Host.DeviceRequests = devices.Devices, devices.DeviceRequests
	c.Host.CgroupParent = o.Sandbox.CgroupParent
	c.Host.OomScoreAdj = o.Host.clampOOM(r.GetOomScoreAdj())
	return nil
}

// resources are limits in Docker's terms. Docker would give as much swap as memory where only memory is limited; Kubernetes means none.
func resources(r *runtimeapi.LinuxContainerResources) container.Resources {
	out := container.Resources{
		CPUShares: r.GetCpuShares(), CPUPeriod: r.GetCpuPeriod(), CPUQuota: r.GetCpuQuota(),
		Memory: r.GetMemoryLimitInBytes(), MemorySwap: r.GetMemorySwapLimitInBytes(),
		CpusetCpus: r.GetCpusetCpus(), CpusetMems: r.GetCpusetMems(),
	}
	if out.MemorySwap == 0 && out.Memory > 0 {
		out.MemorySwap = out.Memory
	}
	return out
}

// kernelLimits are the limits that Docker cannot be told. The OOM score is not among them: Docker takes it when a container is made.
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

// NewUpdate translates UpdateContainerResources. Zero means "leave as it is", for CRI as for Docker; a quota of -1 lifts it.
func NewUpdate(r *runtimeapi.LinuxContainerResources, h Host) (*Update, error) {
	l, err := kernelLimits("linux", r, h)
	if err != nil {
		return nil, err
	}
	if r.GetOomScoreAdj() != 0 {
		l.OOMScoreAdj = h.clampOOM(r.GetOomScoreAdj())
	}
	return &Update{Resources: resources(r), Kernel: l}, nil
}

// readResources are a container's resources as Docker knows them, and the others as they were asked for.
func readResources(h *container.HostConfig, l KernelLimits) *runtimeapi.ContainerResources {
	r := &runtimeapi.LinuxContainerResources{
		CpuPeriod: h.CPUPeriod, CpuQuota: h.CPUQuota, CpuShares: h.CPUShares,
		MemoryLimitInBytes: h.Memory, MemorySwapLimitInBytes: h.MemorySwap,
		CpusetCpus: h.CpusetCpus, CpusetMems: h.CpusetMems, OomScoreAdj: int64(h.OomScoreAdj),
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
		r.HugepageLimits = append(r.HugepageLimits, &runtimeapi.HugepageLimit{PageSize: string(size), Limit: l.Hugepages[size]})
	}
}

// Measured puts what the kernel says of a running container into its record, which is not shared yet. It replaces what was asked for.
func (c *Container) Measured(l KernelLimits) {
	r := c.Resources.GetLinux()
	r.OomScoreAdj = int64(l.OOMScoreAdj)
	setKernelLimits(r, l)
}
