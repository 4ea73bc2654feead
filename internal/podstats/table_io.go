package podstats

import (
	"strconv"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/stats"
)

var diskMetrics = []metric{
	gauge("container_fs_usage_bytes",
		"Bytes used by the writable layer; for the node, by its file system.",
		func(m *measured, put putValue) {
			if l := m.layer; l != nil {
				put(l.bytes, l.fs.Device)
			} else if m.node != nil {
				put(m.node.Used, m.node.Device)
			}
		}, "device").ofLayer(),
	gauge("container_fs_limit_bytes", "Capacity of the writable layer's file system, in bytes.",
		func(m *measured, put putValue) {
			if l := m.layer; l != nil {
				put(l.fs.Bytes, l.fs.Device)
			} else if m.node != nil {
				put(m.node.Bytes, m.node.Device)
			}
		}, "device"),
	gauge("container_fs_inodes_total", "Inodes of the node's file system of writable layers.",
		ofNode(func(fs *stats.FileSystem) uint64 { return fs.Inodes }), "device"),
	gauge("container_fs_inodes_free", "Free inodes of the node's file system of writable layers.",
		ofNode(func(fs *stats.FileSystem) uint64 { return fs.InodesFree }), "device"),
	counter("container_fs_reads_total", "Reads from disk.",
		eachDevice(
			func(d cgroup.Device) uint64 { return d.Reads },
			func(d *stats.Disk) uint64 { return d.Reads },
		), "device"),
	counter("container_fs_reads_bytes_total", "Bytes read from disk.",
		eachDevice(
			func(d cgroup.Device) uint64 { return d.ReadBytes },
			func(d *stats.Disk) uint64 { return d.SectorsRead * sector },
		), "device"),
	counter("container_fs_writes_total", "Writes to disk.",
		eachDevice(
			func(d cgroup.Device) uint64 { return d.Writes },
			func(d *stats.Disk) uint64 { return d.Writes },
		), "device"),
	counter("container_fs_writes_bytes_total", "Bytes written to disk.",
		eachDevice(
			func(d cgroup.Device) uint64 { return d.WriteBytes },
			func(d *stats.Disk) uint64 { return d.SectorsWritten * sector },
		), "device"),
}

// nodeDiskMetrics contains metrics of the node's disk only: the kernel does not have them per
// cgroup.
var nodeDiskMetrics = []metric{
	counter("container_fs_reads_merged_total", "Merged reads from the node's disk.",
		ofDisk(func(d *stats.Disk) uint64 { return d.ReadsMerged }), "device"),
	counter("container_fs_writes_merged_total", "Merged writes to the node's disk.",
		ofDisk(func(d *stats.Disk) uint64 { return d.WritesMerged }), "device"),
	counter("container_fs_sector_reads_total", "Sectors read from the node's disk.",
		ofDisk(func(d *stats.Disk) uint64 { return d.SectorsRead }), "device"),
	counter("container_fs_sector_writes_total", "Sectors written to the node's disk.",
		ofDisk(func(d *stats.Disk) uint64 { return d.SectorsWritten }), "device"),
	counter("container_fs_read_seconds_total", "Time spent on reads from the node's disk, in seconds.",
		ofDisk(func(d *stats.Disk) uint64 { return uint64(d.ReadTime) }), "device").inSeconds(),
	counter("container_fs_write_seconds_total", "Time spent on writes to the node's disk, in seconds.",
		ofDisk(func(d *stats.Disk) uint64 { return uint64(d.WriteTime) }), "device").inSeconds(),
	gauge("container_fs_io_current", "I/O operations in progress on the node's disk.",
		ofDisk(func(d *stats.Disk) uint64 { return d.Current }), "device"),
	counter("container_fs_io_time_seconds_total", "Time the node's disk was busy, in seconds.",
		ofDisk(func(d *stats.Disk) uint64 { return uint64(d.Time) }), "device").inSeconds(),
	counter("container_fs_io_time_weighted_seconds_total",
		"Time the node's disk was busy, weighted by the I/O operations in progress, in seconds.",
		ofDisk(func(d *stats.Disk) uint64 { return uint64(d.WeightedTime) }), "device").inSeconds(),
}

// diskUsageMetrics contains a metric in the form of older cAdvisors, and one not in cAdvisor.
var diskUsageMetrics = []metric{
	counter("container_blkio_device_usage_total", "Bytes read from and written to a disk.",
		reportDeviceUsage, "device", "major", "minor", "operation"),
	gauge("container_log_usage_bytes",
		"Disk usage of the log at the container's log path, rotated files included; 0 without one. Not a metric of "+
			"cAdvisor.",
		one(func(m *measured) *uint64 { return m.logBytes })),
}

func reportDeviceUsage(m *measured, put putValue) {
	for _, d := range m.devices() {
		name, major, minor := m.device(d.Major, d.Minor), strconv.Itoa(int(d.Major)), strconv.Itoa(int(d.Minor))
		put(d.ReadBytes, name, major, minor, "Read")
		put(d.WriteBytes, name, major, minor, "Write")
	}

	if m.hasNoDiskYet() {
		put(0, "", "", "", "Read")
		put(0, "", "", "", "Write")
	}
}

// sector is the unit of /proc/diskstats in bytes, independent of the disk's sector size.
const sector = 512

// ofNode reports a value of the node's file system.
func ofNode(f func(fs *stats.FileSystem) uint64) reportFunc {
	return func(m *measured, put putValue) {
		if m.node != nil {
			put(f(m.node), m.node.Device)
		}
	}
}

// ofDisk reports a value of the node's disk. It reports 0 if the kernel lists no disk for the file
// system, for example for a network file system.
func ofDisk(f func(d *stats.Disk) uint64) reportFunc {
	return func(m *measured, put putValue) {
		switch {
		case m.node == nil:
		case m.node.Disk != nil:
			put(f(m.node.Disk), m.node.Device)
		default:
			put(0, m.node.Device)
		}
	}
}

// eachDevice reports a value for every disk, with an empty name if a container has used none yet.
// For the node it reports the value of its disk.
func eachDevice(f func(d cgroup.Device) uint64, ofNodes func(d *stats.Disk) uint64) reportFunc {
	return func(m *measured, put putValue) {
		ofDisk(ofNodes)(m, put)

		unknown, some := uint64(0), m.hasNoDiskYet()
		for _, d := range m.devices() {
			if name := m.device(d.Major, d.Minor); name != "" {
				put(f(d), name)
			} else { // one sum for all of them, since duplicate labels invalidate the list
				unknown, some = unknown+f(d), true
			}
		}

		if some {
			put(unknown, "")
		}
	}
}

var networkMetrics = onlyAll("for pods with a network of their own",
	counter("container_network_receive_bytes_total", "Bytes received.",
		eachInterface(func(i *stats.Interface) uint64 { return i.RxBytes }), "interface"),
	counter("container_network_receive_packets_total", "Packets received.",
		eachInterface(func(i *stats.Interface) uint64 { return i.RxPackets }), "interface"),
	counter("container_network_receive_packets_dropped_total", "Packets dropped while receiving.",
		eachInterface(func(i *stats.Interface) uint64 { return i.RxDropped }), "interface"),
	counter("container_network_receive_errors_total", "Errors while receiving.",
		eachInterface(func(i *stats.Interface) uint64 { return i.RxErrors }), "interface"),
	counter("container_network_transmit_bytes_total", "Bytes sent.",
		eachInterface(func(i *stats.Interface) uint64 { return i.TxBytes }), "interface"),
	counter("container_network_transmit_packets_total", "Packets sent.",
		eachInterface(func(i *stats.Interface) uint64 { return i.TxPackets }), "interface"),
	counter("container_network_transmit_packets_dropped_total", "Packets dropped while sending.",
		eachInterface(func(i *stats.Interface) uint64 { return i.TxDropped }), "interface"),
	counter("container_network_transmit_errors_total", "Errors while sending.",
		eachInterface(func(i *stats.Interface) uint64 { return i.TxErrors }), "interface"),
)

// eachInterface reports a value of each network interface of a pod.
func eachInterface(f func(i *stats.Interface) uint64) reportFunc {
	return func(m *measured, put putValue) {
		for i := range m.network {
			put(f(&m.network[i]), m.network[i].Name)
		}
	}
}
