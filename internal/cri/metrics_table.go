package cri

import (
	"os"
	"slices"
	"strconv"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/stats"
)

// measured is what one set of labels stands for: a container, a pod's control group, a pod's network, or the node. What is nil has no figures.
type measured struct {
	labels []string // values of metricLabels
	now    time.Time
	start  time.Time // zero for a pod's control group, which the kubelet has made

	details   *stats.Details
	container *spec.Container
	processes *stats.Processes
	network   []stats.Interface
	layer     *layer
	node      *stats.FileSystem // with this nothing else is told
	logBytes  *uint64
	device    func(major, minor uint32) string
}

// layer is a container's writable layer, as measured a moment ago, and its file system as it is.
type layer struct {
	bytes uint64
	at    time.Time
	fs    stats.FileSystem
}

// metricLabels are the labels of every metric, those of the kubelet's /metrics/cadvisor. A pod as a whole has only id, namespace and pod, its network
// the container POD and the name and image of its pause, the node only the id "/": so cAdvisor does it with Docker.
var metricLabels = [SharedLabels]string{"container", "id", "image", "name", "namespace", "pod"}

// metric is a figure under the name by which cAdvisor publishes it. Exactly one of one and each is there.
type metric struct {
	name, help string
	gauge      bool     // a counter else
	labels     []string // beside metricLabels
	nanos      bool     // in nanoseconds, and published in seconds
	// measuredBefore says that the figure is as old as the measured layer.
	measuredBefore bool

	one  func(m *measured) *uint64 // nil: not told
	each func(m *measured, put putMetric)
}

// measuredAt is when a figure was measured, zero for now.
func (m *measured) measuredAt(x *metric) time.Time {
	if x.measuredBefore && m.layer != nil {
		return m.layer.at
	}
	return time.Time{}
}

// putMetric publishes a figure with the values of the metric's own labels.
type putMetric func(value uint64, labels ...string)

// samples are all figures of what was measured: which of metrics, the value, and the values of its own labels.
func (m *measured) samples(put func(i int, value uint64, labels []string)) {
	var i int
	each := func(value uint64, labels ...string) { put(i, value, labels) } // once, not for each metric
	for i = range metrics {
		x := &metrics[i]
		if x.one != nil {
			if v := x.one(m); v != nil {
				put(i, *v, nil)
			}
			continue
		}
		x.each(m, each)
	}
}

// ofGroup is a figure of a control group.
func ofGroup(f func(d *stats.Details) *uint64) func(*measured) *uint64 {
	return func(m *measured) *uint64 {
		if m.details == nil {
			return nil
		}
		return f(m.details)
	}
}

// metrics are all of them, by subject.
var metrics = slices.Concat(aboutMetrics, cpuMetrics, memoryMetrics, hugePageMetrics, diskMetrics, networkMetrics, processMetrics, pressureMetrics, limitMetrics)

var aboutMetrics = []metric{
	{name: "container_last_seen", help: "Unix time at which it was last seen, in seconds.", gauge: true, one: func(m *measured) *uint64 { return seconds(m.now) }},
	{name: "container_start_time_seconds", help: "Unix time of the start, in seconds.", gauge: true, one: func(m *measured) *uint64 { return seconds(m.start) }},
}

// seconds is a time since 1970, nil for none.
func seconds(t time.Time) *uint64 {
	if t.IsZero() {
		return nil
	}
	s := uint64(t.Unix())
	return &s
}

var cpuMetrics = []metric{
	{name: "container_cpu_usage_seconds_total", help: "CPU time of all cores together, in seconds.", labels: []string{"cpu"}, nanos: true, each: func(m *measured, put putMetric) {
		if m.details != nil {
			put(m.details.CPU, "total")
		}
	}},
	{name: "container_cpu_user_seconds_total", help: "CPU time outside the kernel, in seconds.", nanos: true, one: ofGroup(func(d *stats.Details) *uint64 { return &d.User })},
	{name: "container_cpu_system_seconds_total", help: "CPU time in the kernel, in seconds.", nanos: true, one: ofGroup(func(d *stats.Details) *uint64 { return &d.System })},
	{name: "container_cpu_cfs_periods_total", help: "Periods of the CPU quota in which it was wanted.", one: throttling(func(d *stats.Details) *uint64 { return &d.Throttling.Periods })},
	{name: "container_cpu_cfs_throttled_periods_total", help: "Periods in which the CPU quota was used up.", one: throttling(func(d *stats.Details) *uint64 { return &d.Throttling.Throttled })},
	{name: "container_cpu_cfs_throttled_seconds_total", help: "Time for which the CPU quota held processes up, in seconds.", nanos: true, one: throttling(func(d *stats.Details) *uint64 { return &d.Throttling.Time })},
}

// throttling is of groups that have a CPU quota, or had one.
func throttling(f func(d *stats.Details) *uint64) func(*measured) *uint64 {
	return func(m *measured) *uint64 {
		if m.details == nil || m.details.Throttling == nil || m.details.Throttling.Periods == 0 && m.limits().GetCpuQuota() <= 0 {
			return nil
		}
		return f(m.details)
	}
}

// limits are those that a container has been given.
func (m *measured) limits() *runtimeapi.LinuxContainerResources {
	if m.container == nil {
		return nil
	}
	return m.container.Resources.GetLinux()
}

var memoryMetrics = []metric{
	{name: "container_memory_usage_bytes", help: "Memory in use, page cache included.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.Usage })},
	{name: "container_memory_working_set_bytes", help: "Memory in use without the page cache that is given up first.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.WorkingSet })},
	{name: "container_memory_rss", help: "Anonymous memory, in bytes.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.RSS })},
	{name: "container_memory_cache", help: "Page cache, in bytes.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.Cache })},
	{name: "container_memory_mapped_file", help: "Files that are mapped, in bytes.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.MappedFile })},
	{name: "container_memory_total_active_file_bytes", help: "Page cache that was used lately.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.ActiveFile })},
	{name: "container_memory_total_inactive_file_bytes", help: "Page cache that is given up first.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return &d.Memory.InactiveFile })},
	{name: "container_memory_kernel_usage", help: "Memory that the kernel uses for it, in bytes.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return d.KernelMemory })},
	{name: "container_memory_max_usage_bytes", help: "The most memory that has been in use.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return d.MaxUsage })},
	{name: "container_memory_failcnt", help: "How often memory was at its limit.", one: ofGroup(func(d *stats.Details) *uint64 { return d.LimitHits })},
	{name: "container_memory_swap", help: "Memory that is swapped out, in bytes.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 {
		if d.Swap == nil {
			return nil
		}
		return &d.Swap.Usage
	})},
	{name: "container_memory_failures_total", help: "Page faults, and those that read from disk.", labels: []string{"failure_type", "scope"}, each: func(m *measured, put putMetric) {
		if d := m.details; d != nil {
			put(d.OwnFaults, "pgfault", "container")
			put(d.Memory.Faults, "pgfault", "hierarchy")
			put(d.OwnMajorFaults, "pgmajfault", "container")
			put(d.Memory.MajorFaults, "pgmajfault", "hierarchy")
		}
	}},
	{name: "container_oom_events_total", help: "Processes that were killed for want of memory.", one: ofGroup(func(d *stats.Details) *uint64 { return d.OOMKills })},
}

func (m *measured) hugePages() []cgroup.HugePages {
	if m.details == nil {
		return nil
	}
	return m.details.HugePages
}

var hugePageMetrics = []metric{
	{name: "container_hugetlb_usage_bytes", help: "Huge pages in use.", gauge: true, labels: []string{"pagesize"}, each: func(m *measured, put putMetric) {
		for _, h := range m.hugePages() {
			put(h.Usage, string(h.Size))
		}
	}},
	{name: "container_hugetlb_max_usage_bytes", help: "The most huge pages that have been in use.", gauge: true, labels: []string{"pagesize"}, each: func(m *measured, put putMetric) {
		for _, h := range m.hugePages() {
			if h.MaxUsage != nil {
				put(*h.MaxUsage, string(h.Size))
			}
		}
	}},
	{name: "container_hugetlb_failcnt", help: "How often huge pages were at their limit.", labels: []string{"pagesize"}, each: func(m *measured, put putMetric) {
		for _, h := range m.hugePages() {
			if h.LimitHits != nil {
				put(*h.LimitHits, string(h.Size))
			}
		}
	}},
}

var diskMetrics = slices.Concat([]metric{
	{name: "container_fs_usage_bytes", help: "What the writable layer takes on disk; of the node, what its file system holds.", gauge: true, measuredBefore: true, labels: []string{"device"}, each: func(m *measured, put putMetric) {
		if l := m.layer; l != nil {
			put(l.bytes, l.fs.Device)
		} else if m.node != nil {
			put(m.node.Used, m.node.Device)
		}
	}},
	{name: "container_fs_limit_bytes", help: "What the file system of the writable layer can hold.", gauge: true, labels: []string{"device"}, each: func(m *measured, put putMetric) {
		if l := m.layer; l != nil {
			put(l.fs.Bytes, l.fs.Device)
		} else if m.node != nil {
			put(m.node.Bytes, m.node.Device)
		}
	}},
	{name: "container_fs_inodes_total", help: "Inodes of the node's file system of writable layers.", gauge: true, labels: []string{"device"}, each: ofNode(func(fs *stats.FileSystem) uint64 { return fs.Inodes })},
	{name: "container_fs_inodes_free", help: "Free inodes of the node's file system of writable layers.", gauge: true, labels: []string{"device"}, each: ofNode(func(fs *stats.FileSystem) uint64 { return fs.InodesFree })},
	{name: "container_fs_reads_total", help: "Reads from disk.", labels: []string{"device"}, each: eachDevice(func(d cgroup.Device) uint64 { return d.Reads }, func(d *stats.Disk) uint64 { return d.Reads })},
	{name: "container_fs_reads_bytes_total", help: "Bytes read from disk.", labels: []string{"device"}, each: eachDevice(func(d cgroup.Device) uint64 { return d.ReadBytes }, func(d *stats.Disk) uint64 { return d.SectorsRead * sector })},
	{name: "container_fs_writes_total", help: "Writes to disk.", labels: []string{"device"}, each: eachDevice(func(d cgroup.Device) uint64 { return d.Writes }, func(d *stats.Disk) uint64 { return d.Writes })},
	{name: "container_fs_writes_bytes_total", help: "Bytes written to disk.", labels: []string{"device"}, each: eachDevice(func(d cgroup.Device) uint64 { return d.WriteBytes }, func(d *stats.Disk) uint64 { return d.SectorsWritten * sector })},
}, nodeDiskMetrics, []metric{
	{name: "container_blkio_device_usage_total", help: "Bytes read from and written to a disk.", labels: []string{"device", "major", "minor", "operation"}, each: func(m *measured, put putMetric) {
		for _, d := range m.devices() {
			name, major, minor := m.device(d.Major, d.Minor), strconv.Itoa(int(d.Major)), strconv.Itoa(int(d.Minor))
			put(d.ReadBytes, name, major, minor, "Read")
			put(d.WriteBytes, name, major, minor, "Write")
		}
		if m.noDiskYet() {
			put(0, "", "", "", "Read")
			put(0, "", "", "", "Write")
		}
	}},
	{name: "container_log_usage_bytes", help: "What the log takes on disk, rotated files included. No figure of cAdvisor's.", gauge: true, one: func(m *measured) *uint64 { return m.logBytes }},
})

// nodeDiskMetrics are of the node's disk alone: the kernel does not tell them of control groups.
var nodeDiskMetrics = []metric{
	{name: "container_fs_reads_merged_total", help: "Reads from the node's disk that were done together with others.", labels: []string{"device"}, each: ofDisk(func(d *stats.Disk) uint64 { return d.ReadsMerged })},
	{name: "container_fs_writes_merged_total", help: "Writes to the node's disk that were done together with others.", labels: []string{"device"}, each: ofDisk(func(d *stats.Disk) uint64 { return d.WritesMerged })},
	{name: "container_fs_sector_reads_total", help: "Sectors read from the node's disk.", labels: []string{"device"}, each: ofDisk(func(d *stats.Disk) uint64 { return d.SectorsRead })},
	{name: "container_fs_sector_writes_total", help: "Sectors written to the node's disk.", labels: []string{"device"}, each: ofDisk(func(d *stats.Disk) uint64 { return d.SectorsWritten })},
	{name: "container_fs_read_seconds_total", help: "Time that reads from the node's disk took, in seconds.", nanos: true, labels: []string{"device"}, each: ofDisk(func(d *stats.Disk) uint64 { return uint64(d.ReadTime) })},
	{name: "container_fs_write_seconds_total", help: "Time that writes to the node's disk took, in seconds.", nanos: true, labels: []string{"device"}, each: ofDisk(func(d *stats.Disk) uint64 { return uint64(d.WriteTime) })},
	{name: "container_fs_io_current", help: "Operations of the node's disk that are under way.", gauge: true, labels: []string{"device"}, each: ofDisk(func(d *stats.Disk) uint64 { return d.Current })},
	{name: "container_fs_io_time_seconds_total", help: "Time for which the node's disk had something to do, in seconds.", nanos: true, labels: []string{"device"}, each: ofDisk(func(d *stats.Disk) uint64 { return uint64(d.Time) })},
	{name: "container_fs_io_time_weighted_seconds_total", help: "The same, times the operations that were under way, in seconds.", nanos: true, labels: []string{"device"}, each: ofDisk(func(d *stats.Disk) uint64 { return uint64(d.WeightedTime) })},
}

// sector is the unit of /proc/diskstats, in bytes, whatever the disk's own is.
const sector = 512

// ofNode is a figure of the node's file system.
func ofNode(f func(fs *stats.FileSystem) uint64) func(*measured, putMetric) {
	return func(m *measured, put putMetric) {
		if m.node != nil {
			put(f(m.node), m.node.Device)
		}
	}
}

// ofDisk is a figure of its disk: 0 if the kernel lists no disk for the file system, such as a network's.
func ofDisk(f func(d *stats.Disk) uint64) func(*measured, putMetric) {
	return func(m *measured, put putMetric) {
		switch {
		case m.node == nil:
		case m.node.Disk != nil:
			put(f(m.node.Disk), m.node.Device)
		default:
			put(0, m.node.Device)
		}
	}
}

// eachDevice is a figure of every disk; one of no disk says that a container has used none yet. Of the node it is that of its disk.
func eachDevice(f func(d cgroup.Device) uint64, ofNodes func(d *stats.Disk) uint64) func(*measured, putMetric) {
	return func(m *measured, put putMetric) {
		ofDisk(ofNodes)(m, put)
		unknown, some := uint64(0), m.noDiskYet()
		for _, d := range m.devices() {
			if name := m.device(d.Major, d.Minor); name != "" {
				put(f(d), name)
			} else { // one figure for all of them, since equal labels spoil a list
				unknown, some = unknown+f(d), true
			}
		}
		if some {
			put(unknown, "")
		}
	}
}

// noDiskYet says that a container has used no disk, for which the kernel has no line. Of a pod that is told by its containers.
func (m *measured) noDiskYet() bool {
	return m.container != nil && m.details != nil && len(m.details.Devices) == 0
}

func (m *measured) devices() []cgroup.Device {
	if m.details == nil {
		return nil
	}
	return m.details.Devices
}

var networkMetrics = []metric{
	{name: "container_network_receive_bytes_total", help: "Bytes received.", labels: []string{"interface"}, each: eachInterface(func(i *stats.Interface) uint64 { return i.RxBytes })},
	{name: "container_network_receive_packets_total", help: "Packets received.", labels: []string{"interface"}, each: eachInterface(func(i *stats.Interface) uint64 { return i.RxPackets })},
	{name: "container_network_receive_packets_dropped_total", help: "Packets dropped while receiving.", labels: []string{"interface"}, each: eachInterface(func(i *stats.Interface) uint64 { return i.RxDropped })},
	{name: "container_network_receive_errors_total", help: "Errors while receiving.", labels: []string{"interface"}, each: eachInterface(func(i *stats.Interface) uint64 { return i.RxErrors })},
	{name: "container_network_transmit_bytes_total", help: "Bytes sent.", labels: []string{"interface"}, each: eachInterface(func(i *stats.Interface) uint64 { return i.TxBytes })},
	{name: "container_network_transmit_packets_total", help: "Packets sent.", labels: []string{"interface"}, each: eachInterface(func(i *stats.Interface) uint64 { return i.TxPackets })},
	{name: "container_network_transmit_packets_dropped_total", help: "Packets dropped while sending.", labels: []string{"interface"}, each: eachInterface(func(i *stats.Interface) uint64 { return i.TxDropped })},
	{name: "container_network_transmit_errors_total", help: "Errors while sending.", labels: []string{"interface"}, each: eachInterface(func(i *stats.Interface) uint64 { return i.TxErrors })},
}

func eachInterface(f func(i *stats.Interface) uint64) func(*measured, putMetric) {
	return func(m *measured, put putMetric) {
		for i := range m.network {
			put(f(&m.network[i]), m.network[i].Name)
		}
	}
}

var processMetrics = []metric{
	{name: "container_processes", help: "Processes.", gauge: true, one: ofProcesses(func(p *stats.Processes) *uint64 { return &p.Count })},
	{name: "container_threads", help: "Threads of all processes.", gauge: true, one: ofGroup(func(d *stats.Details) *uint64 { return d.Threads })},
	{name: "container_threads_max", help: "The most threads that it may have; 0 for no limit.", gauge: true, one: ofGroup(maxThreads)},
	{name: "container_file_descriptors", help: "Open descriptors of all processes.", gauge: true, one: ofProcesses(func(p *stats.Processes) *uint64 { return p.Files })},
	{name: "container_sockets", help: "Open sockets of all processes.", gauge: true, one: ofProcesses(func(p *stats.Processes) *uint64 { return p.Sockets })},
	{name: "container_ulimits_soft", help: "Soft limits of the main process; what is not limited is not there.", gauge: true, labels: []string{"ulimit"}, each: func(m *measured, put putMetric) {
		if m.processes != nil && m.processes.MaxFiles != nil {
			put(*m.processes.MaxFiles, "max_open_files")
		}
	}},
}

// maxThreads is 0 without a limit, as cAdvisor has it, and nil where the kernel does not count threads.
func maxThreads(d *stats.Details) *uint64 {
	if d.MaxThreads == nil && d.Threads != nil {
		return new(uint64)
	}
	return d.MaxThreads
}

func ofProcesses(f func(p *stats.Processes) *uint64) func(*measured) *uint64 {
	return func(m *measured) *uint64 {
		if m.processes == nil {
			return nil
		}
		return f(m.processes)
	}
}

var pressureMetrics = []metric{
	{name: "container_pressure_cpu_waiting_seconds_total", help: "Time for which a process waited for CPU, in seconds.", nanos: true, one: pressure(func(d *stats.Details) *cgroup.Pressure { return d.CPUPressure }, false)},
	{name: "container_pressure_cpu_stalled_seconds_total", help: "Time for which all processes waited for CPU, in seconds.", nanos: true, one: pressure(func(d *stats.Details) *cgroup.Pressure { return d.CPUPressure }, true)},
	{name: "container_pressure_memory_waiting_seconds_total", help: "Time for which a process waited for memory, in seconds.", nanos: true, one: pressure(func(d *stats.Details) *cgroup.Pressure { return d.MemoryPressure }, false)},
	{name: "container_pressure_memory_stalled_seconds_total", help: "Time for which all processes waited for memory, in seconds.", nanos: true, one: pressure(func(d *stats.Details) *cgroup.Pressure { return d.MemoryPressure }, true)},
	{name: "container_pressure_io_waiting_seconds_total", help: "Time for which a process waited for a disk, in seconds.", nanos: true, one: pressure(func(d *stats.Details) *cgroup.Pressure { return d.IOPressure }, false)},
	{name: "container_pressure_io_stalled_seconds_total", help: "Time for which all processes waited for a disk, in seconds.", nanos: true, one: pressure(func(d *stats.Details) *cgroup.Pressure { return d.IOPressure }, true)},
}

func pressure(of func(d *stats.Details) *cgroup.Pressure, full bool) func(*measured) *uint64 {
	return ofGroup(func(d *stats.Details) *uint64 {
		p := of(d)
		if p == nil {
			return nil
		}
		total := uint64(p.Some.Total)
		if full {
			total = uint64(p.Full.Total)
		}
		return &total
	})
}

// defaultPeriod is the period of the CPU's scheduler where none is given, in microseconds (Documentation/scheduler/sched-bwc.rst).
const defaultPeriod = 100000

var limitMetrics = []metric{
	{name: "container_spec_cpu_period", help: "Period of the CPU quota, in microseconds.", gauge: true, one: limit(func(r *runtimeapi.LinuxContainerResources) int64 {
		if r.CpuPeriod == 0 {
			return defaultPeriod
		}
		return r.CpuPeriod
	}, 1)},
	{name: "container_spec_cpu_quota", help: "CPU quota for each period, in microseconds; without one not there.", gauge: true, one: limit(func(r *runtimeapi.LinuxContainerResources) int64 { return r.CpuQuota }, 1)},
	{name: "container_spec_cpu_shares", help: "CPU shares.", gauge: true, one: limit(func(r *runtimeapi.LinuxContainerResources) int64 { return r.CpuShares }, 1)},
	{name: "container_spec_memory_limit_bytes", help: "Limit of memory; 0 for none.", gauge: true, one: limit(func(r *runtimeapi.LinuxContainerResources) int64 { return wholePages(r.MemoryLimitInBytes) }, 0)},
	{name: "container_spec_memory_swap_limit_bytes", help: "Limit of memory and swap together; 0 for none.", gauge: true, one: limit(func(r *runtimeapi.LinuxContainerResources) int64 { return wholePages(r.MemorySwapLimitInBytes) }, 0)},
	{name: "container_spec_memory_reservation_limit_bytes", help: "Memory that is kept for it; 0 for none.", gauge: true, one: limit(func(r *runtimeapi.LinuxContainerResources) int64 {
		n, _ := strconv.ParseInt(r.Unified["memory.min"], 10, 64)
		return n
	}, 0)},
}

// wholePages is a limit of memory as the kernel keeps it, in whole pages (mm/page_counter.c, page_counter_memparse).
func wholePages(limit int64) int64 { return max(limit, 0) &^ int64(os.Getpagesize()-1) }

// limit is what a container was given, if it is at least so much.
func limit(f func(r *runtimeapi.LinuxContainerResources) int64, least int64) func(*measured) *uint64 {
	return func(m *measured) *uint64 {
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
	}
}
