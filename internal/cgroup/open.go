package cgroup

import (
	"errors"
	"io/fs"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/safefs"
)

// openBeneath opens name, the path of a group or of one of its files, beneath the mount point of a
// hierarchy. No component may be a link or the root of another mount, so that nothing else is ever
// read or written for a group.
func openBeneath(root, name string, flags uint64) (int, error) {
	hierarchy, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(hierarchy) //nolint:errcheck // a descriptor of a path only

	how := unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}

	fd, err := safefs.Openat2(hierarchy, strings.TrimPrefix(name, "/"), &how)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: root + name, Err: err}
	}

	return fd, nil
}

// isThere says whether a group exists in a hierarchy.
func isThere(root, path string) bool {
	fd, err := openBeneath(root, path, unix.O_PATH|unix.O_DIRECTORY)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err == nil
}

// openat opens a file of the kernel's in a directory of the kernel's.
func openat(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err == nil {
			return fd, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return -1, &fs.PathError{Op: "open", Path: name, Err: err}
		}
	}
}

// atEnd is how much of a page a read must leave for the file to have ended: the kernel shows as
// many lines as fit into one.
const atEnd = 2048

// maxFile bounds the files that Read reads.
const maxFile = 4 << 20

// Read appends the content of a kernel file, of lines that are shorter than atEnd, to buf; of a
// very long one the beginning. It does with half of the system calls of os.ReadFile, which asks for
// the size, tries to wait for the file and looks whether there is more.
func Read(name string, buf []byte) ([]byte, error) { return readAt(unix.AT_FDCWD, name, buf, maxFile) }

// readAt is Read of a file in a directory, and of at most limit bytes.
func readAt(dir int, name string, buf []byte, limit int) ([]byte, error) {
	fd, err := openat(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read
	return readOpen(fd, name, buf, limit)
}

func readOpen(fd int, name string, buf []byte, limit int) ([]byte, error) {
	limit += len(buf)

	for {
		buf = slices.Grow(buf, 1024)
		n, err := unix.Read(fd, buf[len(buf):min(cap(buf), max(limit, len(buf)+1))])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, &fs.PathError{Op: "read", Path: name, Err: err}
		default:
			buf = buf[:len(buf)+n]
			if n < atEnd && len(buf) < cap(buf) || len(buf) >= limit {
				return buf[:min(len(buf), limit)], nil
			}
		}
	}
}

// readFile reads a file of the group, at most maxGroupFile bytes of it.
func (g *Group) readFile(c controller, name string) ([]byte, error) {
	root, path := g.place(c)
	if root == "" {
		return nil, fs.ErrNotExist
	}

	fd, err := openBeneath(root, path+"/"+name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read

	return readOpen(fd, name, nil, maxGroupFile)
}

// maxGroupFile bounds files of a group that are read by name.
const maxGroupFile = 64 << 10

// readNumber is the only number of a file that is seldom read, nil if there is none.
func (g *Group) readNumber(c controller, name string) *uint64 {
	b, err := g.readFile(c, name)
	if err != nil {
		return nil
	}

	n, err := parse(trim(b))
	if err != nil {
		return nil
	}

	return &n
}

// writeFile writes a file of the group, which must exist: fs.ErrNotExist else.
func (g *Group) writeFile(c controller, name, value string) error {
	root, path := g.place(c)
	if root == "" {
		return fs.ErrNotExist
	}

	fd, err := openBeneath(root, path+"/"+name, unix.O_WRONLY|unix.O_TRUNC)
	if err != nil {
		return err
	}

	_, err = unix.Write(fd, []byte(value))

	return errors.Join(err, unix.Close(fd))
}
