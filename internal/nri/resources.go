package nri

import (
	"fmt"
	"maps"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// toResources returns resources of the CRI as plugins see them. A field of 0 is unset.
func toResources(r *runtimeapi.LinuxContainerResources) *api.LinuxResources {
	if r == nil {
		return nil
	}

	out := &api.LinuxResources{
		Memory:  &api.LinuxMemory{},
		Cpu:     &api.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()},
		Unified: maps.Clone(r.GetUnified()),
	}
	if v := r.GetMemoryLimitInBytes(); v != 0 {
		out.Memory.Limit = api.Int64(v)
	}
	if v := r.GetMemorySwapLimitInBytes(); v != 0 {
		out.Memory.Swap = api.Int64(v)
	}
	if v := r.GetCpuShares(); v > 0 {
		out.Cpu.Shares = api.UInt64(uint64(v))
	}
	if v := r.GetCpuQuota(); v != 0 {
		out.Cpu.Quota = api.Int64(v)
	}
	if v := r.GetCpuPeriod(); v > 0 {
		out.Cpu.Period = api.UInt64(uint64(v))
	}

	for _, p := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, &api.HugepageLimit{
			PageSize: p.GetPageSize(),
			Limit:    p.GetLimit(),
		})
	}

	return out
}

// fromResources returns the resources of a plugin in terms of the CRI, without otherResources.
func fromResources(r *api.LinuxResources) *runtimeapi.LinuxContainerResources {
	cpu, memory := r.GetCpu(), r.GetMemory()
	out := &runtimeapi.LinuxContainerResources{
		CpuShares:              int64(min(cpu.GetShares().GetValue(), 1<<62)),
		CpuQuota:               cpu.GetQuota().GetValue(),
		CpuPeriod:              int64(min(cpu.GetPeriod().GetValue(), 1<<62)),
		CpusetCpus:             cpu.GetCpus(),
		CpusetMems:             cpu.GetMems(),
		MemoryLimitInBytes:     memory.GetLimit().GetValue(),
		MemorySwapLimitInBytes: memory.GetSwap().GetValue(),
		Unified:                maps.Clone(r.GetUnified()),
	}
	for _, p := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, &runtimeapi.HugepageLimit{
			PageSize: p.GetPageSize(),
			Limit:    p.GetLimit(),
		})
	}

	return out
}

// pluginResources returns the resources that the CRI does not have and Docker has.
func pluginResources(r *api.LinuxResources) (out model.PluginResources, err error) {
	if p := r.GetPids(); p != nil {
		out.PidsLimit = p.GetLimit()
		if out.PidsLimit <= 0 { // OCI runtime specification, pids
			out.PidsLimit = -1
		}
	}

	if m := r.GetMemory().GetReservation(); m != nil {
		if m.GetValue() <= 0 {
			return out, fmt.Errorf("a memory reservation of %d is not positive: %w", m.GetValue(),
				errdefs.ErrInvalidArgument)
		}
		out.MemoryReservation = m.GetValue()
	}

	return out, nil
}

// Update is the request of a plugin to change the resources of a container.
type Update struct {
	ID        model.ContainerID
	Resources *runtimeapi.LinuxContainerResources
	Others    model.PluginResources
	// Problem is the reason why the update cannot be carried out, nil for none.
	Problem error
	// IgnoreFailure: a failure is no error.
	IgnoreFailure bool

	message *api.ContainerUpdate
}

func fromUpdates(messages []*api.ContainerUpdate) []Update {
	var out []Update
	for _, m := range messages {
		if m == nil || m.GetLinux().GetResources() == nil {
			continue
		}

		r := m.GetLinux().GetResources()
		u := Update{
			ID:            model.ContainerID(m.GetContainerId()),
			Resources:     fromResources(r),
			IgnoreFailure: m.GetIgnoreFailure(),
			message:       m,
		}
		u.Others, u.Problem = pluginResources(r)

		var other []string
		for _, p := range propertiesOf(otherResources, r) {
			other = append(other, p.name)
		}
		if len(other) > 0 {
			u.Problem = fmt.Errorf("an update cannot set %q: %w", other, errdefs.ErrNotImplemented)
		}
		out = append(out, u)
	}

	return out
}
