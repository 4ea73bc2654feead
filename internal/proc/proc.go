// Package proc finds trustworthy processes on this host. Any user can start a process with any name
// and arguments. So the package accepts a process only if it runs as root in the namespaces of this
// program. It reads a process through a descriptor of its directory in /proc, so that a reused PID
// never leads to another process. It executes nothing below /proc.
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

// Limits, in bytes, on the data read from a process.
const (
	maxArgs   = 128 << 10 // the size limit of one argument (MAX_ARG_STRLEN, execve(2))
	maxStatus = 64 << 10
)

// ErrForeign is returned for a process that does not run as root in our namespaces, or that changed
// while it was read.
var ErrForeign = fmt.Errorf("not a process of root on this host: %w", errdefs.ErrPermissionDenied)

// FS is a mount of procfs.
type FS struct {
	root       string
	namespaces []string
	byStatus   bool
}

// Host returns the host's procfs, /proc. It accepts root's processes in the user, PID and mount
// namespaces of this program. The reference is our own namespaces rather than those of process 1. A
// node may itself be a container, and a program in its own namespace cannot resolve paths in the
// arguments of outside processes. See Foreign.
func Host() FS { return At("/proc") }

// At returns a procfs mounted elsewhere, for tests.
func At(root string) FS { return FS{root: root, namespaces: []string{"user", "pid", "mnt"}} }

// ByStatus returns the same procfs with weaker checks. It judges a process by its world-readable
// status: its user IDs, and no PID namespace below ours (NSpid, proc_pid_status(5)). Services use
// it if they lack the right to read the links of a process with more capabilities (ptrace(2),
// access mode checking). Such processes may run in another mount namespace. Their program is
// unknown, and paths in their arguments may refer to other files.
func (f FS) ByStatus() FS { return FS{root: f.root, byStatus: true} }

// Foreign returns the reason for which processes of the host may be invisible: one of our
// namespaces differs from that of process 1, or cannot be read. It returns "" if all match, or if
// we are not root.
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

// Process is a process of root in our namespaces.
type Process struct {
	PID     int
	Program string   // path of the executable, as the kernel reports it
	Args    []string // without the program's name

	start string
}

// Find returns all processes except this one whose executable name satisfies match, sorted by PID.
// It skips unreadable processes.
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

// Process returns the process with this PID, or ErrForeign.
func (f FS) Process(pid int) (Process, error) {
	return f.read(pid, func(string) bool { return true })
}

// IsStopped reports whether p is stopped by a signal or a debugger (proc_pid_stat(5), states T and
// t). A stopped process keeps its sockets open and does not respond.
func (f FS) IsStopped(p Process) bool {
	d, err := f.Open(strconv.Itoa(p.PID))
	if err != nil {
		return false
	}
	defer d.Close()

	stat, err := d.ReadFile("stat", maxStatus)
	if err != nil || parseStartTime(stat) != p.start {
		return false
	}
	state := statFields(stat)[0]

	return state == "T" || state == "t"
}

// Signal sends a signal to p, and never to another process with a reused PID. It returns ErrForeign
// if p has ended.
func (f FS) Signal(p Process, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)

	// The descriptor refers to the current owner of the PID. Verify again that this is p.
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

// identity holds the attributes that must not change during a read. A process that executes another
// program keeps its PID and its start time.
type identity struct{ start, users, program string }

// read reads a process. It verifies the identity before the arguments, because reading a stranger's
// memory can block.
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
		return Process{}, fmt.Errorf("process %d runs another program: %w", pid, errdefs.ErrNotFound)
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

// Dir is the /proc directory of one process. It never refers to another process.
type Dir struct{ f *os.File }

// Open opens the directory of a process, given its PID or "self".
func (f FS) Open(name string) (Dir, error) {
	file, err := os.OpenFile(filepath.Join(f.root, name), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return Dir{file}, err
}

// Close releases the descriptor.
func (d Dir) Close() error { return d.f.Close() }

// Path returns a path to a file of the process, valid until Close.
func (d Dir) Path(name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", d.f.Fd(), name) }

// InCgroup reports whether the path of the process's control group contains the container's ID
// (cgroups(7)).
func (d Dir) InCgroup(id string) bool {
	b, err := d.ReadFile("cgroup", maxStatus)
	return err == nil && id != "" && bytes.Contains(b, []byte(id))
}

// Parent returns the PID of the parent process (proc_pid_stat(5), field 4).
func (d Dir) Parent() (int, error) {
	stat, err := d.ReadFile("stat", maxStatus)
	if err != nil {
		return 0, err
	}

	fields := statFields(stat)
	if len(fields) < 2 {
		return 0, fmt.Errorf("%s: no parent", d.f.Name())
	}

	return strconv.Atoi(fields[1])
}

// identify returns the identity of a process of root in the namespaces of self, or ErrForeign.
func (d Dir) identify(self Dir, f FS) (identity, error) {
	var id identity
	status, err := d.ReadFile("status", maxStatus)
	if err != nil {
		return id, err
	}

	id.users = parseStatusField(status, "Uid:")
	if !slices.Equal(strings.Fields(id.users), []string{"0", "0", "0", "0"}) {
		return id, ErrForeign
	}
	if f.byStatus && len(strings.Fields(parseStatusField(status, "NSpid:"))) != 1 {
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

	if id.start = parseStartTime(stat); id.start == "" {
		return id, ErrForeign
	}
	if f.byStatus {
		return id, nil
	}

	program, err := d.link("exe")
	id.program = strings.TrimSuffix(program, " (deleted)")

	return id, err
}

// parseStatusField returns the value of a field of proc_pid_status(5). For "Uid:" these are the
// real, effective, saved and file system user IDs.
func parseStatusField(status []byte, name string) string {
	for line := range bytes.Lines(status) {
		if rest, found := bytes.CutPrefix(line, []byte(name)); found {
			return string(rest)
		}
	}
	return ""
}

// parseStartTime returns field 22 of proc_pid_stat(5), or "" without one.
func parseStartTime(stat []byte) string {
	fields := statFields(stat)
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

// statFields returns the fields of proc_pid_stat(5) from field 3 on. The name in parentheses before
// them may contain any character.
func statFields(stat []byte) []string {
	return strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
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

// ReadFile reads a file of the process. It returns an error if the file exceeds limit bytes.
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

// Links returns the targets of all links in a directory of the process, such as fd.
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
