// Package safefs opens files beneath directories writable by others. The kernel resolves a path
// from a directory's descriptor (openat2(2)), so it never follows a link planted or swapped in
// meanwhile. Each file is checked before use.
package safefs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ErrTooLarge is returned for a file larger than the read limit.
var ErrTooLarge = fmt.Errorf("file is too large: %w", errdefs.ErrOutOfRange)

// beneath restricts a resolution to its directory and forbids links.
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// maxDisturbance limits the time to resolve a path during concurrent renames (EAGAIN, openat2(2)).
// A resolution takes microseconds. A count of attempts would pass within the time slice of the
// program that renames.
const maxDisturbance = time.Second

// OpenAt opens name, a relative path beneath the directory dir. flags are those of open(2);
// O_CLOEXEC is added. perm is the mode of a new file. No component may be a link, and the path may
// not leave dir. Errors are *os.PathError: ELOOP for a link, EXDEV for a path out of dir.
func OpenAt(dir *os.File, name string, flags int, perm os.FileMode) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: beneath,
	}
	if flags&unix.O_CREAT != 0 || flags&unix.O_TMPFILE == unix.O_TMPFILE {
		how.Mode = uint64(perm.Perm())
	}

	path := filepath.Join(dir.Name(), name)
	fd, err := Openat2(int(dir.Fd()), name, &how)
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: path, Err: err}
	}

	return os.NewFile(uintptr(fd), path), nil
}

// Openat2 calls openat2(2) again while renames and mounts anywhere on the machine disturb the
// resolution of "..". It returns a descriptor, or an errno: EAGAIN if the disturbance continues for
// a second.
func Openat2(dir int, name string, how *unix.OpenHow) (fd int, err error) {
	for end := time.Now().Add(maxDisturbance); ; runtime.Gosched() {
		fd, err = unix.Openat2(dir, name, how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			return fd, err
		}
	}
}

// OpenDir opens a directory by an absolute path from our own configuration, for use with OpenAt.
func OpenDir(path string) (*os.File, error) {
	return os.OpenFile(path, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
}

// OpenRegular opens a regular file beneath dir for reading. It never blocks, and returns
// FailedPrecondition for a FIFO or a device.
func OpenRegular(dir *os.File, name string) (*os.File, error) {
	f, err := OpenAt(dir, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	return checkRegular(f)
}

// OpenRegularPath opens a regular file by its path for reading. It follows links only in parent
// directories, so those must belong to root. It never blocks.
func OpenRegularPath(path string) (*os.File, error) {
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return checkRegular(f)
}

func checkRegular(f *os.File) (*os.File, error) {
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file but %s: %w", f.Name(), st.Mode().Type(),
			errdefs.ErrFailedPrecondition)
	}

	if err != nil {
		return nil, errors.Join(err, f.Close())
	}

	return f, nil
}

// ReadAll reads a file of at most limit bytes. It returns ErrTooLarge for a larger one.
func ReadAll(f *os.File, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}

	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes: %w", f.Name(), limit, ErrTooLarge)
	}

	return b, nil
}

// ReadTrusted reads a regular file of at most limit bytes by a path from the operator or the
// kubelet. It follows links and never blocks.
func ReadTrusted(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}

	if f, err = checkRegular(f); err != nil {
		return nil, err
	}
	defer f.Close()

	return ReadAll(f, limit)
}

// ReadFile reads a regular file of at most limit bytes by its path. See OpenRegularPath.
func ReadFile(path string, limit int64) ([]byte, error) {
	f, err := OpenRegularPath(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()

	return ReadAll(f, limit)
}
