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
// hierarchy. No component may be a link or a mount point, so a group's path never leads to anything
// else.
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

// groupExists reports whether a group exists in a hierarchy.
func groupExists(root, path string) bool {
	fd, err := openBeneath(root, path, unix.O_PATH|unix.O_DIRECTORY)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err == nil
}

// openat opens a kernel file in a kernel directory.
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

// atEnd is the minimum size, in bytes, of a read before the end of a file: a shorter read has
// reached the end. The kernel returns as many lines as fit into a page.
const atEnd = 2048

// maxFile limits the files read by Read, in bytes.
const maxFile = 4 << 20

// Read appends the content of a kernel file to buf. Lines must be shorter than atEnd, and very long
// files are truncated. It needs half of the system calls of os.ReadFile, because os.ReadFile
// queries the size, tries to poll the file and reads again at the end.
func Read(name string, buf []byte) ([]byte, error) { return readAt(unix.AT_FDCWD, name, buf, maxFile) }

// readAt does the same as Read for a file in a directory, and reads at most limit bytes.
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

// readFile reads at most maxGroupFile bytes of a file of the group.
func (g *Group) readFile(c controller, name string) ([]byte, error) {
	root, path := g.locate(c)
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

// maxGroupFile limits the files of a group read by name, in bytes.
const maxGroupFile = 64 << 10

// readNumber reads the only number of an infrequently read file. It returns nil if there is none.
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

// writeFile writes an existing file of the group. It returns fs.ErrNotExist if there is none.
func (g *Group) writeFile(c controller, name, value string) error {
	root, path := g.locate(c)
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
