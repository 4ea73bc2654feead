package stats

import (
	"bytes"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/cgroup"
)

// Processes are a container's processes and what they hold open.
type Processes struct {
	Count   uint64
	Files   *uint64 // descriptors; nil where they may not be seen
	Sockets *uint64 // of the descriptors; nil also where there are too many to look at each
	// MaxFiles is the main process's soft limit of descriptors; nil for none.
	MaxFiles *uint64
}

// Bounds for one container.
const (
	// lookedAt is how many descriptors, or processes, are looked at: two microseconds each.
	lookedAt = 4096
	// counted is how many descriptors are counted where the kernel does not say how many there are.
	counted = 1 << 14
)

// Descriptors are a container's processes with what they hold open. NotFound if it has ended.
func (r *Reader) Descriptors(id string, pid int) (Processes, error) {
	g, err := r.group(key{id: id}, pid)
	if err != nil {
		return Processes{}, err
	}

	pids, err := g.PIDs()
	if err != nil {
		return Processes{}, err
	}

	out := Processes{Count: uint64(len(pids)), MaxFiles: r.maxFiles(g, pid)}
	if len(pids) > lookedAt {
		return out, nil
	}

	var files, sockets uint64
	for _, p := range pids {
		n, s, ok := r.openFiles(p, lookedAt-min(files, lookedAt))
		if !ok {
			return out, nil
		}
		files, sockets = files+n, sockets+s
	}

	out.Files = &files
	if files <= lookedAt {
		out.Sockets = &sockets
	}

	return out, nil
}

// openFiles counts a process's descriptors (proc_pid_fd(5)), and the sockets among as many as are
// looked at. One that has ended has none.
func (r *Reader) openFiles(pid int, look uint64) (files, sockets uint64, ok bool) {
	dir, err := unix.Open(filepath.Join(r.kernel.Proc, strconv.Itoa(pid), "fd"),
		unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, 0, err == unix.ENOENT || err == unix.ESRCH //nolint:errorlint // a system call's own
	}
	defer unix.Close(dir)

	var st unix.Stat_t // its size is the number of descriptors since Linux 6.2
	if unix.Fstat(dir, &st) == nil && uint64(st.Size) > look {
		return uint64(st.Size), 0, true
	}

	var link [16]byte
	err = eachName(dir, func(name string) bool {
		if files++; files <= look {
			if n, err := unix.Readlinkat(dir, name, link[:]); err == nil &&
				bytes.HasPrefix(link[:n], []byte("socket:")) {
				sockets++
			}
		}
		return files < counted
	})
	if files >= counted {
		return 0, 0, false
	}

	return files, sockets, err == nil || err == unix.ENOENT || err == unix.ESRCH //nolint:errorlint // as above
}

// eachName calls do for what lies in a directory, until it returns false. It does with half of the
// system calls of os.ReadDir, which tries to wait for the directory.
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

// maxFiles is the soft limit of descriptors, nil for none.
func (r *Reader) maxFiles(g *cgroup.Group, pid int) *uint64 {
	n, err := r.limit(pid)
	if err == unix.EPERM { //nolint:errorlint // a system call's own; without CAP_SYS_RESOURCE another user's process may not be asked
		return fileOfLimits(g)
	}

	if err != nil || n == unix.RLIM_INFINITY || !g.Alive() { // who has ended has none, and its PID may be another's
		return nil
	}

	return &n
}

// fileOfLimits reads the same where everybody may (proc_pid_limits(5)), which costs ten times as
// much.
func fileOfLimits(g *cgroup.Group) (limit *uint64) {
	_ = processFile(g, "limits", func(content []byte) { // who has ended has none
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

// softLimit asks the kernel for a process's soft limit of descriptors (prlimit(2)).
func softLimit(pid int) (uint64, error) {
	var l unix.Rlimit
	err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &l)
	return l.Cur, err
}
