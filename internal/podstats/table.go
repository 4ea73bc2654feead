package podstats

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/stats"
)

// sharedLabels are the labels of every metric, as in the kubelet's /metrics/cadvisor. As with
// cAdvisor on Docker, a pod as a whole has only id, namespace and pod. Its network has the
// container POD, with the name and image of the pause container. The node has only the id "/".
var sharedLabels = [...]string{"container", "id", "image", "name", "namespace", "pod"}

// metric is one metric under cAdvisor's name.
type metric struct {
	name, help string
	labels     []string // in addition to sharedLabels
	isGauge    bool     // else a counter
	isNanos    bool     // read in nanoseconds, published in seconds
	isOfLayer  bool     // from the last measurement of the layer
	when       string   // see Descriptor.When
	report     reportFunc
}

// reportFunc calls put with each of a subject's values of a metric.
type reportFunc func(m *measured, put putValue)

// putValue takes a value with the values of the metric's own labels.
type putValue func(value uint64, labels ...string)

func counter(name, help string, report reportFunc, labels ...string) metric {
	return metric{name: name, help: help, report: report, labels: labels}
}

func gauge(name, help string, report reportFunc, labels ...string) metric {
	x := counter(name, help, report, labels...)
	x.isGauge = true
	return x
}

func (x metric) inSeconds() metric {
	x.isNanos = true
	return x
}

func (x metric) ofLayer() metric {
	x.isOfLayer = true
	return x
}

// describe returns the help of a metric with its condition.
func (x metric) describe() string {
	if x.when == "" {
		return x.help
	}
	return strings.TrimSuffix(x.help, ".") + "; " + x.when + "."
}

// only limits a metric to running containers that meet a condition.
func (x metric) only(when string) metric {
	x.when = when
	return x
}

// onlyAll limits metrics to running containers that meet a condition.
func onlyAll(when string, all ...metric) []metric {
	for i := range all {
		all[i] = all[i].only(when)
	}
	return all
}

// one reports a single value, or none for nil.
func one(f func(m *measured) *uint64) reportFunc {
	return func(m *measured, put putValue) {
		if v := f(m); v != nil {
			put(*v)
		}
	}
}

// ofGroup reports a value of a cgroup, or none for nil.
func ofGroup(f func(d *stats.Details) *uint64) reportFunc {
	return one(func(m *measured) *uint64 {
		if m.details == nil {
			return nil
		}
		return f(m.details)
	})
}

// metrics lists all metrics, by subject.
var metrics = slices.Concat(
	aboutMetrics,
	cpuMetrics,
	memoryMetrics,
	hugePageMetrics,
	diskMetrics,
	nodeDiskMetrics,
	diskUsageMetrics,
	networkMetrics,
	processMetrics,
	pressureMetrics,
	limitMetrics,
)

var aboutMetrics = []metric{
	gauge("container_last_seen", "Unix time of the last observation, in seconds.",
		one(func(m *measured) *uint64 { return seconds(m.now) })),
	gauge("container_start_time_seconds", "Unix time of the start, in seconds.",
		one(func(m *measured) *uint64 { return seconds(m.start) })),
}

// seconds returns a Unix time, nil for the zero time.
func seconds(t time.Time) *uint64 {
	if t.IsZero() {
		return nil
	}
	s := uint64(t.Unix())
	return &s
}

var cpuMetrics = []metric{
	counter("container_cpu_usage_seconds_total", "CPU time of all cores together, in seconds.",
		func(m *measured, put putValue) {
			if m.details != nil {
				put(m.details.CPU, "total")
			}
		}, "cpu").inSeconds(),
	counter("container_cpu_user_seconds_total", "CPU time outside the kernel, in seconds.",
		ofGroup(func(d *stats.Details) *uint64 { return &d.User })).inSeconds(),
	counter("container_cpu_system_seconds_total", "CPU time in the kernel, in seconds.",
		ofGroup(func(d *stats.Details) *uint64 { return &d.System })).inSeconds(),
	counter("container_cpu_cfs_periods_total", "Elapsed enforcement periods of the CPU quota.",
		throttling(func(d *stats.Details) *uint64 { return &d.Throttling.Periods })).only("with a CPU quota"),
	counter("container_cpu_cfs_throttled_periods_total", "Throttled enforcement periods of the CPU quota.",
		throttling(func(d *stats.Details) *uint64 { return &d.Throttling.Throttled })).only("with a CPU quota"),
	counter("container_cpu_cfs_throttled_seconds_total", "Time throttled by the CPU quota, in seconds.",
		throttling(func(d *stats.Details) *uint64 { return &d.Throttling.Time })).only("with a CPU quota").inSeconds(),
}

// throttling reports a value of a cgroup with a current or earlier CPU quota.
func throttling(f func(d *stats.Details) *uint64) reportFunc {
	return one(func(m *measured) *uint64 {
		if m.details == nil || m.details.Throttling == nil {
			return nil
		}
		if m.details.Throttling.Periods == 0 && m.limits().GetCpuQuota() <= 0 {
			return nil
		}
		return f(m.details)
	})
}

var memoryMetrics = []metric{
	gauge("container_memory_usage_bytes", "Memory in use, page cache included.",
		ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.Usage })),
	gauge("container_memory_working_set_bytes", "Memory in use without inactive page cache.",
		ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.WorkingSet })),
	gauge("container_memory_rss", "Anonymous memory, in bytes.",
		ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.RSS })),
	gauge("container_memory_cache", "Page cache, in bytes.",
		ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.Cache })),
	gauge("container_memory_mapped_file", "Mapped files, in bytes.",
		ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.MappedFile })),
	gauge("container_memory_total_active_file_bytes", "Active page cache, in bytes.",
		ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.ActiveFile })),
	gauge("container_memory_total_inactive_file_bytes", "Inactive page cache, in bytes.",
		ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.InactiveFile })),
	gauge("container_memory_kernel_usage", "Kernel memory, in bytes.",
		ofGroup(func(d *stats.Details) *uint64 { return d.KernelMemory })).only("cgroup v2 needs Linux 5.18"),
	gauge("container_memory_max_usage_bytes", "Maximum memory usage.",
		ofGroup(func(d *stats.Details) *uint64 { return d.MaxUsage })).only("cgroup v2 needs Linux 5.19"),
	counter("container_memory_failcnt", "Number of times the memory usage hit its limit.",
		ofGroup(func(d *stats.Details) *uint64 { return d.LimitHits })),
	counter("container_memory_events_high_total", "Number of times the memory usage exceeded memory.high.",
		ofGroup(func(d *stats.Details) *uint64 { return d.HighHits })),
	counter("container_memory_events_max_total", "Number of times the memory usage hit its limit.",
		ofGroup(func(d *stats.Details) *uint64 { return d.LimitHits })),
	gauge("container_memory_swap", "Swapped out memory, in bytes.",
		ofGroup(func(d *stats.Details) *uint64 {
			if d.Swap == nil {
				return nil
			}
			return &d.Swap.Usage
		})).only("with swap accounting"),
	counter("container_memory_failures_total", "Page faults and major page faults.",
		func(m *measured, put putValue) {
			if d := m.details; d != nil {
				put(d.OwnFaults, "pgfault", "container")
				put(d.Memory.Faults, "pgfault", "hierarchy")
				put(d.OwnMajorFaults, "pgmajfault", "container")
				put(d.Memory.MajorFaults, "pgmajfault", "hierarchy")
			}
		}, "failure_type", "scope"),
	counter("container_oom_events_total", "Processes killed by the OOM killer.",
		ofGroup(func(d *stats.Details) *uint64 { return d.OOMKills })),
}

var hugePageMetrics = []metric{
	gauge("container_hugetlb_usage_bytes", "Huge pages in use.",
		ofHugePages(func(h *cgroup.HugePages) *uint64 { return &h.Usage }), "pagesize").
		only("with the hugetlb controller"),
	gauge("container_hugetlb_max_usage_bytes", "Maximum usage of huge pages.",
		ofHugePages(func(h *cgroup.HugePages) *uint64 { return h.MaxUsage }), "pagesize").only("on cgroup v1"),
	counter("container_hugetlb_failcnt", "Number of times the usage of huge pages hit its limit.",
		ofHugePages(func(h *cgroup.HugePages) *uint64 { return h.LimitHits }), "pagesize").
		only("with the hugetlb controller"),
}

// ofHugePages reports a value for each size of huge pages, or none for nil.
func ofHugePages(f func(h *cgroup.HugePages) *uint64) reportFunc {
	return func(m *measured, put putValue) {
		if m.details == nil {
			return
		}

		for i := range m.details.HugePages {
			h := &m.details.HugePages[i]
			if v := f(h); v != nil {
				put(*v, string(h.Size))
			}
		}
	}
}

var processMetrics = []metric{
	gauge("container_processes", "Processes.",
		ofProcesses(func(p *stats.Processes) *uint64 { return &p.Count })),
	gauge("container_threads", "Threads of all processes.",
		ofGroup(func(d *stats.Details) *uint64 { return d.Threads })),
	gauge("container_threads_max", "Limit of threads; 0 for no limit.",
		ofGroup(maxThreads)),
	gauge("container_file_descriptors", "Open descriptors of all processes.",
		ofProcesses(func(p *stats.Processes) *uint64 { return p.Files })),
	gauge("container_sockets", "Open sockets of all processes.",
		ofProcesses(func(p *stats.Processes) *uint64 { return p.Sockets })),
	gauge("container_ulimits_soft", "Soft limits of the main process.",
		func(m *measured, put putValue) {
			if m.processes != nil && m.processes.MaxFiles != nil {
				put(*m.processes.MaxFiles, "max_open_files")
			}
		}, "ulimit").only("with a limit"),
}

// maxThreads returns 0 without a limit, like cAdvisor, and nil if the kernel does not count
// threads.
func maxThreads(d *stats.Details) *uint64 {
	if d.MaxThreads == nil && d.Threads != nil {
		return new(uint64)
	}
	return d.MaxThreads
}

// ofProcesses reports a value of a container's processes, or none for nil.
func ofProcesses(f func(p *stats.Processes) *uint64) reportFunc {
	return one(func(m *measured) *uint64 {
		if m.processes == nil {
			return nil
		}
		return f(m.processes)
	})
}

var pressureMetrics = onlyAll("with PSI",
	counter("container_pressure_cpu_waiting_seconds_total",
		"Time with at least one process waiting for CPU, in seconds.",
		waiting(func(d *stats.Details) *cgroup.Pressure { return d.CPUPressure })).inSeconds(),
	counter("container_pressure_cpu_stalled_seconds_total",
		"Time with all processes waiting for CPU, in seconds.",
		stalled(func(d *stats.Details) *cgroup.Pressure { return d.CPUPressure })).inSeconds(),
	counter("container_pressure_memory_waiting_seconds_total",
		"Time with at least one process waiting for memory, in seconds.",
		waiting(func(d *stats.Details) *cgroup.Pressure { return d.MemoryPressure })).inSeconds(),
	counter("container_pressure_memory_stalled_seconds_total",
		"Time with all processes waiting for memory, in seconds.",
		stalled(func(d *stats.Details) *cgroup.Pressure { return d.MemoryPressure })).inSeconds(),
	counter("container_pressure_io_waiting_seconds_total",
		"Time with at least one process waiting for a disk, in seconds.",
		waiting(func(d *stats.Details) *cgroup.Pressure { return d.IOPressure })).inSeconds(),
	counter("container_pressure_io_stalled_seconds_total",
		"Time with all processes waiting for a disk, in seconds.",
		stalled(func(d *stats.Details) *cgroup.Pressure { return d.IOPressure })).inSeconds(),
)

func waiting(of func(d *stats.Details) *cgroup.Pressure) reportFunc {
	return pressure(of, func(p *cgroup.Pressure) cgroup.Stall { return p.Some })
}

func stalled(of func(d *stats.Details) *cgroup.Pressure) reportFunc {
	return pressure(of, func(p *cgroup.Pressure) cgroup.Stall { return p.Full })
}

func pressure(of func(d *stats.Details) *cgroup.Pressure, stall func(p *cgroup.Pressure) cgroup.Stall) reportFunc {
	return ofGroup(func(d *stats.Details) *uint64 {
		p := of(d)
		if p == nil {
			return nil
		}
		total := uint64(stall(p).Total)
		return &total
	})
}

// defaultPeriod is the default period of the CPU quota, in microseconds
// (Documentation/scheduler/sched-bwc.rst).
const defaultPeriod = 100000

var limitMetrics = []metric{
	gauge("container_spec_cpu_period", "Period of the CPU quota, in microseconds.",
		limit(func(r *runtimeapi.LinuxContainerResources) int64 {
			if r.CpuPeriod == 0 {
				return defaultPeriod
			}
			return r.CpuPeriod
		}, 1)),
	gauge("container_spec_cpu_quota", "CPU quota per period, in microseconds.",
		limit(func(r *runtimeapi.LinuxContainerResources) int64 { return r.CpuQuota }, 1)).only("with a CPU quota"),
	gauge("container_spec_cpu_shares", "CPU shares.",
		limit(func(r *runtimeapi.LinuxContainerResources) int64 { return r.CpuShares }, 1)).only("with CPU shares"),
	gauge("container_spec_memory_limit_bytes", "Memory limit; 0 for none.",
		limit(func(r *runtimeapi.LinuxContainerResources) int64 { return wholePages(r.MemoryLimitInBytes) }, 0)),
	gauge("container_spec_memory_swap_limit_bytes", "Limit of memory and swap together; 0 for none.",
		limit(func(r *runtimeapi.LinuxContainerResources) int64 { return wholePages(r.MemorySwapLimitInBytes) }, 0)),
	gauge("container_spec_memory_reservation_limit_bytes", "Memory reservation; 0 for none.",
		limit(func(r *runtimeapi.LinuxContainerResources) int64 {
			n, _ := strconv.ParseInt(r.Unified["memory.min"], 10, 64)
			return n
		}, 0)),
}

// wholePages rounds a memory limit to whole pages, like the kernel (mm/page_counter.c,
// page_counter_memparse).
func wholePages(limit int64) int64 { return max(limit, 0) &^ int64(os.Getpagesize()-1) }

// limit reports a limit of a container, unless it is below least.
func limit(f func(r *runtimeapi.LinuxContainerResources) int64, least int64) reportFunc {
	return one(func(m *measured) *uint64 {
		r := m.limits()
		if r == nil {
			return nil
		}

		n := f(r)
		if n < least {
			return nil
		}

		v := uint64(n)

		return &v
	})
}
