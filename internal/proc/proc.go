// Package proc finds processes of this host that may be believed. Everybody can start a process
// with any name and arguments, so only those count that run as root in the namespaces of this
// program. A process is read through a descriptor of its directory in /proc, so that another one
// with the same number is never taken for it, and nothing below /proc is executed.
package proc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Bounds of what is read of a process, in bytes.
const (
	maxArgs   = 128 << 10 // one argument can have as much (MAX_ARG_STRLEN, execve(2))
	maxStatus = 64 << 10
)

// ErrForeign says that a process is not one of root in our namespaces, or that it changed while it
// was read.
var ErrForeign = fmt.Errorf("not a process of root on this host: %w", errdefs.ErrPermissionDenied)

// FS is a mount of procfs.
type FS struct {
	root       string
	namespaces []string
	byStatus   bool
}

// Host is /proc. Its processes are those of root in the user, PID and mount namespaces of this
// program. Our own namespaces are the reference, not those of process 1: a node may itself be a
// container, and a program in a namespace of its own cannot judge what processes outside mean by
// the paths of their arguments. See Foreign.
func Host() FS { return At("/proc") }

// At is a procfs at another place, for tests.
func At(root string) FS { return FS{root: root, namespaces: []string{"user", "pid", "mnt"}} }

// ByStatus returns the same procfs, in which a process is judged by what everybody may read: its
// user IDs, and that it is in no PID namespace below ours (NSpid, proc_pid_status(5)). It is for
// services that may not read the links of a process with more capabilities (ptrace(2), access mode
// checking). Such processes may be in another mount namespace, their program is unknown, and paths
// in their arguments may mean other files.
func (f FS) ByStatus() FS { return FS{root: f.root, byStatus: true} }

// Foreign returns why processes of the host may be invisible: which of our namespaces is not that
// of process 1, or that it cannot be read. It returns "" if all are the same, or if we are not
// root.
func (f FS) Foreign() string {
	self, err := f.Open("self")
	if err != nil {
		return ""
	}
	defer self.Close()

	first, err := f.Open("1")
	if err != nil {
		return ""
	}
	defer first.Close()

	names := map[string]string{"user": "user", "pid": "PID", "mnt": "mount"}
	for _, kind := range f.namespaces {
		ours, err := self.link("ns/" + kind)
		if err != nil {
			return ""
		}

		theirs, err := first.link("ns/" + kind)
		switch {
		case err != nil && os.Geteuid() != 0:
			return ""
		case err != nil:
			return "the namespaces of process 1 cannot be read"
		case ours != theirs:
			return fmt.Sprintf("it does not run in the %s namespace of process 1", names[kind])
		}
	}

	return ""
}

// Process is one of root in our namespaces.
type Process struct {
	PID     int
	Program string   // the path of its executable file, as the kernel has it
	Args    []string // without the name of the program

	start string
}

// Find returns the processes, other than this one, for whose executable file's name match is true,
// in the order of their numbers. Those that cannot be read are left out.
func (f FS) Find(match func(name string) bool) []Process {
	dir, err := os.Open(f.root)
	if err != nil {
		return nil
	}
	defer dir.Close()

	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}

	var found []Process
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() {
			continue
		}
		if p, err := f.read(pid, match); err == nil {
			found = append(found, p)
		}
	}

	slices.SortFunc(found, func(a, b Process) int { return a.PID - b.PID })

	return found
}

// Process returns one process by its number, or ErrForeign.
func (f FS) Process(pid int) (Process, error) {
	return f.read(pid, func(string) bool { return true })
}

// Signal sends a signal to p, and to no other process that got its number meanwhile. It returns
// ErrForeign if p has ended.
func (f FS) Signal(p Process, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)

	// The descriptor holds whatever has the number now, so it must still be p after it was opened.
	now, err := f.Process(p.PID)
	if err == nil && now.start != p.start {
		err = ErrForeign
	}

	if err == nil {
		err = unix.PidfdSendSignal(fd, sig, nil, 0)
	}

	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}

	return nil
}

// identity is what must not change while a process is read: a process that executes another
// program keeps its number and its start time.
type identity struct{ start, users, program string }

// read reads a process, who it is before its arguments: reading the memory of a stranger can block.
func (f FS) read(pid int, match func(name string) bool) (Process, error) {
	self, err := f.Open("self")
	if err != nil {
		return Process{}, err
	}
	defer self.Close()

	d, err := f.Open(strconv.Itoa(pid))
	if err != nil {
		return Process{}, err
	}
	defer d.Close()

	id, err := d.identify(self, f)
	if err != nil {
		return Process{}, err
	}

	if !match(filepath.Base(id.program)) {
		return Process{}, fmt.Errorf("process %d is another program: %w", pid, errdefs.ErrNotFound)
	}

	line, err := d.ReadFile("cmdline", maxArgs) // proc_pid_cmdline(5)
	if err != nil {
		return Process{}, err
	}

	if again, err := d.identify(self, f); err != nil || again != id || len(line) == 0 {
		return Process{}, fmt.Errorf("process %d: %w", pid, ErrForeign)
	}

	argv := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")

	return Process{PID: pid, Program: id.program, Args: argv[1:], start: id.start}, nil
}

// Dir is the directory of one process. It stays that of the same process.
type Dir struct{ f *os.File }

// Open opens the directory of a process, by its number or as "self".
func (f FS) Open(name string) (Dir, error) {
	file, err := os.OpenFile(filepath.Join(f.root, name), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return Dir{file}, err
}

// Close releases the descriptor.
func (d Dir) Close() error { return d.f.Close() }

// Path is a path to a file of the process, valid until Close.
func (d Dir) Path(name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", d.f.Fd(), name) }

// InCgroup reports whether the process is in a control group whose path contains the ID of a
// container (cgroups(7)).
func (d Dir) InCgroup(id string) bool {
	b, err := d.ReadFile("cgroup", maxStatus)
	return err == nil && id != "" && bytes.Contains(b, []byte(id))
}

// identify returns the identity of a process of root in the same namespaces as self, or ErrForeign.
func (d Dir) identify(self Dir, f FS) (identity, error) {
	var id identity
	status, err := d.ReadFile("status", maxStatus)
	if err != nil {
		return id, err
	}

	id.users = statusField(status, "Uid:")
	if !slices.Equal(strings.Fields(id.users), []string{"0", "0", "0", "0"}) {
		return id, ErrForeign
	}
	if f.byStatus && len(strings.Fields(statusField(status, "NSpid:"))) != 1 {
		return id, ErrForeign
	}

	for _, kind := range f.namespaces {
		theirs, err := d.link("ns/" + kind)
		ours, ownErr := self.link("ns/" + kind)
		if err != nil || ownErr != nil || theirs != ours {
			return id, ErrForeign
		}
	}

	stat, err := d.ReadFile("stat", maxStatus)
	if err != nil {
		return id, err
	}

	if id.start = startTime(stat); id.start == "" {
		return id, ErrForeign
	}
	if f.byStatus {
		return id, nil
	}

	program, err := d.link("exe")
	id.program = strings.TrimSuffix(program, " (deleted)")

	return id, err
}

// statusField is the rest of the line that begins with a name (proc_pid_status(5)): of "Uid:" the
// real, effective, saved and file system user IDs.
func statusField(status []byte, name string) string {
	for line := range bytes.Lines(status) {
		if rest, found := bytes.CutPrefix(line, []byte(name)); found {
			return string(rest)
		}
	}
	return ""
}

// startTime is field 22 of proc_pid_stat(5), "" if there is none. The name in brackets may hold
// anything.
func startTime(stat []byte) string {
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

func (d Dir) link(name string) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(d.f.Fd()), name, b)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: filepath.Join(d.f.Name(), name), Err: err}
	}
	return string(b[:n]), nil
}

// OpenFile opens a file of the process for reading, such as its executable.
func (d Dir) OpenFile(name string) (*os.File, error) {
	fd, err := unix.Openat(int(d.f.Fd()), name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: filepath.Join(d.f.Name(), name), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(d.f.Name(), name)), nil
}

// ReadFile reads a file of the process of at most limit bytes.
func (d Dir) ReadFile(name string, limit int64) ([]byte, error) {
	file, err := d.OpenFile(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()

	b, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = errors.New("too large")
	}

	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file.Name(), err)
	}

	return b, nil
}

// Links are the targets of the links in a directory of the process, such as fd.
func (d Dir) Links(name string) []string {
	dir, err := d.OpenFile(name)
	if err != nil {
		return nil
	}
	defer dir.Close()

	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}

	var out []string
	for _, n := range names {
		if to, err := d.link(name + "/" + n); err == nil {
			out = append(out, to)
		}
	}

	return out
}
