package validate

import (
	"fmt"
	"strconv"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// resources checks each resource by itself. Zero means unset or unchanged, -1 unlimited.
func (p *problems) resources(field string, r *runtimeapi.LinuxContainerResources) {
	for _, f := range []struct {
		name         string
		value, least int64
	}{
		{"cpu_period", r.GetCpuPeriod(), 0},
		{"cpu_quota", r.GetCpuQuota(), -1},
		{"cpu_shares", r.GetCpuShares(), 0},
		{"memory_limit_in_bytes", r.GetMemoryLimitInBytes(), -1},
		{"memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), -1},
	} {
		if f.value < f.least {
			p.add(field+"."+f.name, "%d must not be below %d", f.value, f.least)
		}
	}

	if s := r.GetOomScoreAdj(); s < -1000 || s > 1000 {
		p.add(field+".oom_score_adj", "%d is not between -1000 and 1000", s)
	}

	p.text(field+".cpuset_cpus", r.GetCpusetCpus())
	p.text(field+".cpuset_mems", r.GetCpusetMems())
	for i, l := range r.GetHugepageLimits() {
		if _, err := model.ParsePageSize(l.GetPageSize()); err != nil {
			p.wrap(fmt.Sprintf("%s.hugepage_limits[%d].page_size", field, i), err)
		}
	}

	for k, v := range r.GetUnified() {
		if _, err := model.ParseUnifiedKey(k); err != nil {
			p.wrap(field+".unified", err)
			continue
		}
		p.required(field+".unified["+strconv.Quote(k)+"]", v)
	}
}

// memoryLimits checks the limit of memory and swap against the limit of memory. isNew is set for a
// container to be created, and unset for an update.
func (p *problems) memoryLimits(field string, r *runtimeapi.LinuxContainerResources, isNew bool) {
	memory, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	switch {
	case swap <= 0:
	case memory < 0, memory == 0 && isNew:
		p.add(field+".memory_swap_limit_in_bytes", "%d needs a memory_limit_in_bytes; use -1 or 0 without one", swap)
	case swap < memory:
		p.add(field+".memory_swap_limit_in_bytes",
			"%d limits memory and swap together and must not be below the memory limit, %d", swap, memory)
	}
}
