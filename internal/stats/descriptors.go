package stats

import (
	"bytes"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/cgroup"
)

// Processes counts a container's processes and their open files.
type Processes struct {
	Count   uint64
	Files   *uint64 // descriptors; nil without permission to list them
	Sockets *uint64 // among the descriptors; also nil if there are too many to inspect
	// MaxFiles is the main process's soft limit of descriptors, or nil without one.
	MaxFiles *uint64
}

// Limits for one container.
const (
	// maxInspected limits the descriptors, or processes, to inspect: two microseconds each.
	maxInspected = 4096
	// maxCounted limits the descriptors to count if the kernel does not report their number.
	maxCounted = 1 << 14
)

// Descriptors counts a container's processes and their open files. It returns NotFound if the
// container has ended.
func (r *Reader) Descriptors(id string, pid int) (Processes, error) {
	g, err := r.findGroup(key{id: id}, pid)
	if err != nil {
		return Processes{}, err
	}

	pids, err := g.PIDs()
	if err != nil {
		return Processes{}, err
	}

	out := Processes{Count: uint64(len(pids)), MaxFiles: r.maxFiles(g, pid)}
	if len(pids) > maxInspected {
		return out, nil
	}

	var files, sockets uint64
	for _, p := range pids {
		n, s, ok := r.openFiles(p, maxInspected-min(files, maxInspected))
		if !ok {
			return out, nil
		}
		files, sockets = files+n, sockets+s
	}

	out.Files = &files
	if files <= maxInspected {
		out.Sockets = &sockets
	}

	return out, nil
}

// openFiles counts a process's descriptors (proc_pid_fd(5)), and the sockets among the first
// inspect ones. An ended process has none.
func (r *Reader) openFiles(pid int, inspect uint64) (files, sockets uint64, ok bool) {
	dir, err := unix.Open(filepath.Join(r.kernel.Proc, strconv.Itoa(pid), "fd"),
		unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, 0, err == unix.ENOENT || err == unix.ESRCH //nolint:errorlint // a plain errno
	}
	defer unix.Close(dir)

	var st unix.Stat_t // its size is the number of descriptors since Linux 6.2
	if unix.Fstat(dir, &st) == nil && uint64(st.Size) > inspect {
		return uint64(st.Size), 0, true
	}

	var link [16]byte
	err = eachName(dir, func(name string) bool {
		if files++; files <= inspect {
			if n, err := unix.Readlinkat(dir, name, link[:]); err == nil &&
				bytes.HasPrefix(link[:n], []byte("socket:")) {
				sockets++
			}
		}
		return files < maxCounted
	})
	if files >= maxCounted {
		return 0, 0, false
	}

	return files, sockets, err == nil || err == unix.ENOENT || err == unix.ESRCH //nolint:errorlint // as above
}

// eachName calls do for each name in a directory, until it returns false. It needs half of the
// system calls of os.ReadDir, because os.ReadDir tries to poll the directory.
func eachName(dir int, do func(name string) bool) error {
	var entries [4096]byte
	var names []string
	for {
		n, err := unix.ReadDirent(dir, entries[:])
		if err != nil || n <= 0 {
			return err
		}

		_, _, names = unix.ParseDirent(entries[:n], -1, names[:0])
		for _, name := range names {
			if !do(name) {
				return nil
			}
		}
	}
}

// maxFiles returns the soft limit of descriptors, or nil without one.
func (r *Reader) maxFiles(g *cgroup.Group, pid int) *uint64 {
	n, err := r.limit(pid)
	if err == unix.EPERM { //nolint:errorlint // a plain errno; other users' processes need CAP_SYS_RESOURCE
		return readLimitsFile(g)
	}

	if err != nil || n == unix.RLIM_INFINITY || !g.IsAlive() { // an ended process has none, and its PID may be reused
		return nil
	}

	return &n
}

// readLimitsFile reads the same limit from a world-readable file (proc_pid_limits(5)). This costs
// ten times as much.
func readLimitsFile(g *cgroup.Group) (limit *uint64) {
	_ = processFile(g, "limits", func(content []byte) { // an ended process has none
		_, rest, _ := bytes.Cut(content, []byte("Max open files"))
		for f := range bytes.FieldsSeq(rest) {
			if n, err := strconv.ParseUint(string(f), 10, 64); err == nil {
				limit = &n
			}
			return
		}
	})

	return limit
}

// readSoftLimit returns the kernel's soft limit of descriptors for a process (prlimit(2)).
func readSoftLimit(pid int) (uint64, error) {
	var l unix.Rlimit
	err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &l)
	return l.Cur, err
}
