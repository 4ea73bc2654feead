package driver

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unicode"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/safefs"
	"cri-dockerd/internal/text"
)

// target is the location of a container's log: a path beneath a directory it must not leave. The
// parent of the pod's log directory belongs to the kubelet, and the operator may have put links
// into its path. The pod's log directory and everything below may be writable by users other than
// root, for instance by a container with /var/log/pods mounted. There no link is followed, and no
// file is opened unless it is the log's alone. This excludes FIFOs, devices, and second names of
// other files.
type target struct {
	Directory string `json:"directory"`
	Path      string `json:"path"`
}

const (
	maxPath = 4096 - 1 // PATH_MAX of limits.h
	maxName = 255      // NAME_MAX
)

// check validates a target before any file access.
func (t target) check() error {
	directory := text.Clean(t.Directory, text.MaxName)
	if !filepath.IsAbs(t.Directory) || filepath.Clean(t.Directory) == "/" || !isPath(t.Directory) {
		return fmt.Errorf("log option %s=%q: must be an absolute path, the pod's log directory", OptionDirectory,
			directory)
	}

	isBelow := filepath.IsLocal(t.Path) && filepath.Clean(t.Path) != "."
	if !isBelow || !isPath(t.Path) || len(t.String()) > maxPath {
		path := text.Clean(t.Path, text.MaxName)
		return fmt.Errorf("log option %s=%q: must be a path within %s", OptionPath, path, directory)
	}

	return nil
}

// isPath reports whether s has a valid length for a path and no control characters.
func isPath(s string) bool {
	for part := range strings.SplitSeq(s, "/") {
		if len(part) > maxName {
			return false
		}
	}
	return len(s) <= maxPath && !strings.ContainsFunc(s, unicode.IsControl)
}

func (t target) String() string { return filepath.Join(t.Directory, t.Path) }

const (
	// fileMode is the mode of logs: writable by root and readable by root's group, as with all
	// runtimes.
	fileMode = 0o640
	dirMode  = 0o755
)

// openDir opens the log's own directory. With create, it creates missing directories.
func (t target) openDir(create bool) (*os.File, error) {
	above := filepath.Dir(filepath.Clean(t.Directory))
	below := filepath.Join(filepath.Base(t.Directory), filepath.Dir(t.Path))
	dir, err := OpenBeneath(above, below, create)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t, err)
	}
	return dir, nil
}

// OpenBeneath opens the directory below, a relative path, in the directory above. It follows links
// in above, because that path belongs to the operator or the kubelet. It follows none in below,
// because others may have write access. With create, it creates missing directories.
func OpenBeneath(above, below string, create bool) (*os.File, error) {
	if create {
		if err := os.MkdirAll(above, dirMode); err != nil {
			return nil, err
		}
	}

	dir, err := safefs.OpenDir(above)
	if err != nil {
		return nil, err
	}

	for name := range strings.SplitSeq(below, "/") {
		next, err := openDirectory(dir, name, create)
		dir.Close()
		if err != nil {
			return nil, err
		}
		dir = next
	}

	return dir, nil
}

func openDirectory(above *os.File, name string, create bool) (*os.File, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW
	dir, err := safefs.OpenAt(above, name, flags, 0)
	if create && errors.Is(err, fs.ErrNotExist) {
		if err := unix.Mkdirat(int(above.Fd()), name, dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, &os.PathError{Op: "mkdir", Path: filepath.Join(above.Name(), name), Err: err}
		}
		dir, err = safefs.OpenAt(above, name, flags, 0)
	}

	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		err = fmt.Errorf("%w: not a directory, and links are not followed here; remove it", err)
	}

	return dir, err
}

// errForeign is the error of a file that is not a log of ours: a link, a FIFO, a device, or a
// second name of another file.
var errForeign = errors.New("not a log file")

// open opens the log for appending. It creates the log and missing directories. It replaces a
// foreign file at the path, so that output is neither lost nor delayed, and returns its description
// in planted. It does not replace a directory.
func (t target) open() (f *os.File, planted error, err error) {
	if err := t.check(); err != nil {
		return nil, nil, err
	}

	dir, err := t.openDir(true)
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close()

	name := filepath.Base(t.Path)
	for range openAttempts {
		f, err = openOwn(dir, name, unix.O_RDWR|unix.O_APPEND)
		if errors.Is(err, fs.ErrNotExist) {
			f, err = safefs.OpenAt(dir, name, unix.O_RDWR|unix.O_APPEND|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW,
				fileMode)
		}

		if !errors.Is(err, fs.ErrExist) { // otherwise another process has created it meanwhile
			break
		}
	}

	if errors.Is(err, errForeign) {
		planted = err
		f, err = replace(dir, name)
	}

	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", t, err)
	}

	return f, planted, nil
}

// openAttempts limits the attempts to open a log while others create and remove it.
const openAttempts = 8

// openOwn opens a log in its directory. It returns errForeign for anything but a regular file with
// a single name: opening a device has side effects, and another name may be in a foreign directory.
// So it checks the file before opening it.
func openOwn(dir *os.File, name string, flags int) (*os.File, error) {
	handle, err := safefs.OpenAt(dir, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer handle.Close()

	st, err := fstat(handle)
	if err != nil {
		return nil, err
	}

	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return nil, &os.PathError{Op: "open", Path: handle.Name(), Err: unix.EISDIR}
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("%s: %w: mode %#o", handle.Name(), errForeign, st.Mode)
	case st.Nlink > 1:
		return nil, fmt.Errorf("%s: %w: it has several hard links", handle.Name(), errForeign)
	}

	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", handle.Fd()), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: handle.Name(), Err: err}
	}

	return os.NewFile(uintptr(fd), handle.Name()), nil
}

func fstat(f *os.File) (st unix.Stat_t, err error) {
	if err = unix.Fstat(int(f.Fd()), &st); err != nil {
		err = &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st, err
}

// replace replaces a foreign file with an empty log.
func replace(dir *os.File, name string) (*os.File, error) {
	tmp := safefs.TemporaryName()
	const flags = unix.O_RDWR | unix.O_APPEND | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW
	created, err := safefs.OpenAt(dir, tmp, flags, fileMode)
	if err != nil {
		return nil, err
	}
	defer created.Close()

	if err := safefs.Rename(dir, tmp, name); err != nil {
		return nil, err
	}

	return openOwn(dir, name, unix.O_RDWR|unix.O_APPEND) // reopen it under its final name
}

const (
	// maxRotated limits the rotated files of a log. The kubelet keeps five (containerLogMaxFiles).
	maxRotated = 1000
	// maxNames limits the search of the directory, which others may have filled.
	maxNames = 100_000
	namesAt  = 1000
)

// listRotated returns the names of the log's rotated files in its directory, oldest first. The
// kubelet renames logs to <log>.<time>, and compresses them to <log>.<time>.gz.
func (t target) listRotated(dir *os.File) ([]string, error) {
	if _, err := dir.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}

	prefix := filepath.Base(t.Path) + "."
	var out []string
	for seen := 0; seen < maxNames && len(out) < maxRotated; {
		names, err := dir.Readdirnames(namesAt)
		for _, name := range names {
			if strings.HasPrefix(name, prefix) && !strings.HasSuffix(name, ".tmp") { // being compressed
				out = append(out, name)
			}
		}

		seen += len(names)
		if errors.Is(err, io.EOF) {
			break
		}

		if err != nil {
			return nil, err
		}
	}

	slices.Sort(out)

	return out, nil
}

// openByInode opens the file with an inode among the log and its rotated files. It returns
// fs.ErrNotExist if there is none. Files may be renamed meanwhile.
func (t target) openByInode(inode uint64) (*os.File, error) {
	if inode == 0 {
		return nil, fs.ErrNotExist
	}

	dir, err := t.openDir(false)
	if err != nil {
		return nil, err
	}
	defer dir.Close()

	for range 3 {
		files, err := t.listRotated(dir)
		if err != nil {
			return nil, err
		}

		// A concurrent rename may hide a file under both names, so try the log's own name twice.
		own := filepath.Base(t.Path)
		for _, name := range slices.Concat([]string{own}, files, []string{own}) {
			if f, err := openInode(dir, name, inode); f != nil || err != nil {
				return f, err
			}
		}
	}

	return nil, fs.ErrNotExist
}

// openInode opens a log if it has this inode. Otherwise it returns nil.
func openInode(dir *os.File, name string, inode uint64) (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil || st.Ino != inode {
		return nil, nil //nolint:nilerr // another file, or none
	}

	f, err := openOwn(dir, name, unix.O_RDWR|unix.O_APPEND)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errForeign) {
		return nil, nil
	}

	if err != nil {
		return nil, err
	}

	if st, err := f.Stat(); err != nil || inodeOf(st) != inode {
		f.Close()
		return nil, nil
	}

	return f, nil
}

func inodeOf(st fs.FileInfo) uint64 {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return sys.Ino
	}
	return 0
}

// tailSize exceeds the size of one batch in a log, in bytes. A record is at most 50 bytes longer
// than its frame, and a frame has at least 25 bytes.
const tailSize = 4 * batchSize

// readTail removes a partial last line, a trace of a killed process, and returns the end of the
// complete lines.
func readTail(f *os.File) ([]byte, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}

	from := max(0, st.Size()-tailSize)
	b, err := io.ReadAll(io.NewSectionReader(f, from, st.Size()-from))
	if err != nil {
		return nil, err
	}

	whole := len(b)
	for whole > 0 && b[whole-1] != '\n' {
		whole--
	}

	if whole < len(b) {
		if err := f.Truncate(from + int64(whole)); err != nil {
			return nil, err
		}
	}

	return b[:whole], nil
}

// isDiskError reports whether the disk caused an error. Such an error may be temporary, unlike that
// of a wrong path.
func isDiskError(err error) bool {
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, syscall.EROFS, syscall.ENOMEM,
		syscall.ESTALE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
