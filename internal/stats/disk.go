package stats

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/cgroup"
)

// FileSystem describes the capacity and usage of a file system, and the I/O of its disk.
type FileSystem struct {
	Device      string // "/dev/sda1", "" if it is not on a disk of this machine
	Bytes, Used uint64
	Inodes      uint64
	InodesFree  uint64
	Disk        *Disk // nil if it is not on a disk of this machine
}

// Disk counts the I/O of a block device since boot (Documentation/admin-guide/iostats.rst).
type Disk struct {
	Reads, ReadsMerged, SectorsRead         uint64
	Writes, WritesMerged, SectorsWritten    uint64
	ReadTime, WriteTime, Time, WeightedTime time.Duration
	Current                                 uint64 // operations in progress
}

// FileSystem returns the file system of a directory (statfs(2)).
func (r *Reader) FileSystem(dir string) (FileSystem, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return FileSystem{}, fmt.Errorf("file system of %s: %w", dir, err)
	}

	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return FileSystem{}, fmt.Errorf("file system of %s: %w", dir, err)
	}

	major, minor := unix.Major(st.Dev), unix.Minor(st.Dev)

	return FileSystem{
		Device:     r.Device(major, minor),
		Bytes:      s.Blocks * uint64(s.Bsize),
		Used:       (s.Blocks - s.Bfree) * uint64(s.Bsize),
		Inodes:     s.Files,
		InodesFree: s.Ffree,
		Disk:       r.readDisk(major, minor),
	}, nil
}

// Fields of a line of /proc/diskstats after the device's numbers and name. Linux 4.18 and later add
// fields for discards and flushes.
const (
	diskReads = iota
	diskReadsMerged
	diskSectorsRead
	diskReadTime // times in milliseconds
	diskWrites
	diskWritesMerged
	diskSectorsWritten
	diskWriteTime
	diskCurrent
	diskTime
	diskWeightedTime
	diskFields
)

// readDisk reads the I/O of a device. It returns nil if the kernel does not report it.
func (r *Reader) readDisk(major, minor uint32) *Disk {
	b, err := cgroup.Read(filepath.Join(r.kernel.Proc, "diskstats"), nil)
	if err != nil {
		return nil
	}

	device := strconv.Itoa(int(major)) + " " + strconv.Itoa(int(minor))
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 3+diskFields || f[0]+" "+f[1] != device {
			continue
		}

		var n [diskFields]uint64
		for i := range n {
			n[i], _ = strconv.ParseUint(f[3+i], 10, 64) // all fields are numbers
		}

		ms := func(field int) time.Duration { return time.Duration(n[field]) * time.Millisecond }

		return &Disk{
			Reads:          n[diskReads],
			ReadsMerged:    n[diskReadsMerged],
			SectorsRead:    n[diskSectorsRead],
			ReadTime:       ms(diskReadTime),
			Writes:         n[diskWrites],
			WritesMerged:   n[diskWritesMerged],
			SectorsWritten: n[diskSectorsWritten],
			WriteTime:      ms(diskWriteTime),
			Current:        n[diskCurrent],
			Time:           ms(diskTime),
			WeightedTime:   ms(diskWeightedTime),
		}
	}

	return nil
}

// Device returns the name of a block device ("/dev/sda"), or "" for none of this machine.
func (r *Reader) Device(major, minor uint32) string { return r.disks.findName(major, minor) }

// blocks is the unit of st_blocks, in bytes.
const blocks = 512

// maxLogFiles limits the files to inspect beside a log. The kubelet keeps five
// (containerLogMaxFiles).
const maxLogFiles = 4096

// LogBytes returns the disk usage of the log of container id: the file at its path, and its files
// rotated by the kubelet. With the engine's json-file driver these are links to the engine's own
// file of that container. Any other link is ignored.
func (r *Reader) LogBytes(id, path string) (uint64, error) {
	dir, base := filepath.Split(path)
	d, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("log %s: %w", path, err)
	}
	defer unix.Close(d) //nolint:errcheck // it was only read

	var sum uint64
	files := 0
	err = eachName(d, func(name string) bool {
		files++
		if name == base || strings.HasPrefix(name, base+".") {
			sum += logFileBytes(d, name, id)
		}
		return files < maxLogFiles
	})
	if err != nil {
		return 0, fmt.Errorf("log %s: %w", path, err)
	}

	return sum, nil
}

// logFileBytes returns the disk usage of one file of a log.
func logFileBytes(dir int, name, id string) uint64 {
	var st unix.Stat_t
	if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return 0
	}

	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(dir, name, target)
		if err != nil || n == len(target) {
			return 0
		}

		file := string(target[:n])
		owner, _, found := strings.Cut(filepath.Base(file), "-json.log")
		if !found || owner != id || !filepath.IsAbs(file) {
			return 0
		}
		if unix.Fstatat(unix.AT_FDCWD, file, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			return 0
		}
	}

	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0
	}

	return uint64(st.Blocks) * blocks
}

// disks holds the names of block devices (/proc/partitions).
type disks struct {
	file string

	mu    sync.Mutex // guards the fields below
	names map[[2]uint32]string
	read  time.Time
}

// disksRefreshInterval is the minimum interval between two reads of the list for an unknown device.
const disksRefreshInterval = time.Minute

func (d *disks) findName(major, minor uint32) string {
	d.mu.Lock()
	defer d.mu.Unlock()

	name, known := d.names[[2]uint32{major, minor}]
	if known || time.Since(d.read) < disksRefreshInterval {
		return name
	}

	d.read, d.names = time.Now(), map[[2]uint32]string{}
	b, _ := cgroup.Read(d.file, nil) // without the file, devices have no names
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line) // major minor #blocks name
		if len(f) != 4 {
			continue
		}

		a, err := strconv.ParseUint(f[0], 10, 32)
		c, err2 := strconv.ParseUint(f[1], 10, 32)
		if err == nil && err2 == nil {
			d.names[[2]uint32{uint32(a), uint32(c)}] = "/dev/" + escapeName(f[3])
		}
	}

	return d.names[[2]uint32{major, minor}]
}
