// Package rootonly decides which files and sockets a program of root may trust on a machine with
// other users: files only root can change, and sockets only root listens on.
package rootonly

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks limits the links in a path to the kernel's own limit (path_resolution(7)).
const maxLinks = 40

// FileError describes a path component writable by other users.
type FileError struct {
	File    string // the requested path
	Because string // the file, directory or link writable by others
	Reason  string // a sentence for the operator
	Shared  bool   // Because is a world-writable directory, such as /tmp
}

func (e *FileError) Error() string { return e.Reason }

// ErrNotRegular is returned for anything but a regular file.
var ErrNotRegular = errors.New("not a regular file")

// Open opens a regular file for reading. It requires that only root or the user of this program can
// change or replace the file, each directory and each link in its path. It never blocks. The
// returned file is exactly the one checked, even if the path changes meanwhile. root is a prefix of
// every path and is trusted itself. Errors: *FileError, ErrNotRegular, and those of open(2).
func Open(root, file string) (*os.File, error) {
	w := walk{root: root, file: file}
	defer w.close()

	found, err := w.resolve()
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	defer found.Close()

	var st unix.Stat_t
	if err := unix.Fstat(int(found.Fd()), &st); err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}

	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("open %s: %w", file, ErrNotRegular)
	}
	if why := describeWriters(&st); why != "" {
		return nil, w.newFileError(w.at(), why, false)
	}
	if w.shared != "" {
		return nil, w.newFileError(w.shared, "everybody can create files there", true)
	}

	checked := fmt.Sprintf("/proc/self/fd/%d", found.Fd())
	opened, err := os.OpenFile(checked, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}

	return opened, nil
}

// walk resolves a path one component at a time.
type walk struct {
	root, file string
	dirs       []*os.File // from the root to the current directory
	names      []string   // of dirs, without the root's
	last       string     // the last opened component
	shared     string     // the current directory, if everybody can create files in it
}

func (w *walk) close() {
	for _, d := range w.dirs {
		d.Close()
	}
}

func (w *walk) at() string { return path.Join("/", path.Join(w.names...), w.last) }

func (w *walk) newFileError(because, why string, shared bool) error {
	return &FileError{File: w.file, Because: because, Reason: because + ": " + why, Shared: shared}
}

// resolve returns the target of the path, opened with O_PATH.
func (w *walk) resolve() (*os.File, error) {
	if !path.IsAbs(w.file) || strings.ContainsRune(w.file, 0) || len(w.file) >= unix.PathMax {
		return nil, errors.New("not an absolute path")
	}

	top, err := os.OpenFile(w.root+"/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}

	w.dirs = []*os.File{top}

	rest, links := components(w.file), 0
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		if name == ".." {
			w.up()
			continue
		}

		found, st, err := w.open(name)
		if err != nil {
			return nil, err
		}

		kind := st.Mode & unix.S_IFMT
		switch {
		case kind == unix.S_IFLNK:
			target, err := w.follow(found, st)
			if links++; err == nil && links > maxLinks {
				err = unix.ELOOP
			}
			if err != nil {
				return nil, err
			}
			if path.IsAbs(target) {
				w.up(w.names...)
			}
			rest = slices.Concat(components(target), rest)

		case len(rest) == 0:
			return found, nil
		case kind != unix.S_IFDIR:
			return nil, errors.Join(unix.ENOTDIR, found.Close())
		default:
			if err := w.down(found, st, name); err != nil {
				return nil, err
			}
		}
	}

	return nil, ErrNotRegular
}

func components(p string) []string {
	return slices.DeleteFunc(strings.Split(p, "/"), func(c string) bool { return c == "" || c == "." })
}

func (w *walk) open(name string) (*os.File, *unix.Stat_t, error) {
	w.last = name
	fd, err := unix.Openat(int(w.dirs[len(w.dirs)-1].Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}

	found := os.NewFile(uintptr(fd), name)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, nil, errors.Join(err, found.Close())
	}

	return found, &st, nil
}

// follow returns the target of a link. The link must belong to a trusted user.
func (w *walk) follow(link *os.File, st *unix.Stat_t) (string, error) {
	defer link.Close()
	if !TrustedUser(st.Uid) {
		return "", w.newFileError(w.at(), fmt.Sprintf("the link belongs to user %d", st.Uid), false)
	}
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(link.Fd()), "", b)
	return string(b[:max(n, 0)]), err
}

// down enters a directory that others cannot change. In a sticky directory, such as /tmp, others
// cannot replace root's files, but they can create new ones.
func (w *walk) down(dir *os.File, st *unix.Stat_t, name string) error {
	why := describeWriters(st)
	sticky := why != "" && TrustedUser(st.Uid) && st.Mode&unix.S_ISVTX != 0
	if why != "" && !sticky {
		return errors.Join(w.newFileError(w.at(), why, false), dir.Close())
	}

	w.dirs, w.names, w.last, w.shared = append(w.dirs, dir), append(w.names, name), "", ""
	if sticky {
		w.shared = w.at()
	}

	return nil
}

// up leaves the current directory, or as many directories as there are names. It never leaves the
// root.
func (w *walk) up(names ...string) {
	for range max(len(names), 1) {
		if len(w.dirs) > 1 {
			w.dirs[len(w.dirs)-1].Close()
			w.dirs, w.names = w.dirs[:len(w.dirs)-1], w.names[:len(w.names)-1]
		}
	}
	w.last, w.shared = "", ""
}

// describeWriters describes the other users with write access to a file or directory. It returns ""
// if there are none.
func describeWriters(st *unix.Stat_t) string {
	switch {
	case !TrustedUser(st.Uid):
		return fmt.Sprintf("it belongs to user %d", st.Uid)
	case st.Mode&0o002 != 0:
		return "everybody can write to it"
	case st.Mode&0o020 != 0:
		return fmt.Sprintf("group %d can write to it", st.Gid)
	}

	return ""
}

// TrustedUser reports whether a user is root or the user of this program.
func TrustedUser(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

// checkSocketDirectory returns an error if other users can replace a socket.
func checkSocketDirectory(socket string) error {
	w := walk{file: socket}
	defer w.close()

	found, err := w.resolve()
	if err == nil {
		err = found.Close()
	}

	var u *FileError
	switch {
	case errors.As(err, &u):
		return u
	case w.shared != "":
		return w.newFileError(w.shared, "everybody can create files there", true)
	}

	return nil // the caller reports an unusable path
}
