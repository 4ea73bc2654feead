package driver

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// target is where a container's log stands: a path beneath a directory that it must not leave, also not through symbolic links.
type target struct {
	Directory string `json:"directory"`
	Path      string `json:"path"`
}

// check says what is wrong with a target, before anything is touched.
func (t target) check() error {
	if !filepath.IsAbs(t.Directory) || filepath.Clean(t.Directory) == "/" {
		return fmt.Errorf("log option %s=%q: give the pod's log directory, an absolute path", OptionDirectory, t.Directory)
	}
	if t.Path == "" || !filepath.IsLocal(t.Path) || filepath.Clean(t.Path) == "." {
		return fmt.Errorf("log option %s=%q: give a path within %s", OptionPath, t.Path, t.Directory)
	}
	return nil
}

func (t target) String() string { return filepath.Join(t.Directory, t.Path) }

const (
	// fileMode is of logs: root writes, root's group may read, as all runtimes have it.
	fileMode = 0o640
	dirMode  = 0o755
)

// open opens the log for appending. It and missing directories are made.
func (t target) open() (*os.File, error) {
	if err := t.check(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(t.Directory, dirMode); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(t.Directory)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := root.MkdirAll(filepath.Dir(t.Path), dirMode); err != nil {
		return nil, fmt.Errorf("%s: %w", t, err)
	}
	// Not blocking, lest a FIFO in the way holds us up.
	f, err := root.OpenFile(t.Path, os.O_RDWR|os.O_APPEND|os.O_CREATE|syscall.O_NONBLOCK, fileMode)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t, err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is in the way: it is no file", t)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// rotated are the log's earlier files, the oldest first: the kubelet renames to <log>.<time>, and compresses to <log>.<time>.gz.
func (t target) rotated() ([]string, error) {
	log := t.String()
	all, err := filepath.Glob(escapeGlob(log) + ".*")
	if err != nil {
		return nil, err
	}
	out := all[:0]
	for _, f := range all {
		if !strings.HasSuffix(f, ".tmp") { // being compressed
			out = append(out, f)
		}
	}
	return out, nil // Glob sorts
}

func escapeGlob(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// byInode opens the file with an inode among the log and its rotated files; fs.ErrNotExist if there is none. Files may be renamed meanwhile.
func (t target) byInode(inode uint64) (*os.File, error) {
	if inode == 0 {
		return nil, fs.ErrNotExist
	}
	for range 3 {
		files, err := t.rotated()
		if err != nil {
			return nil, err
		}
		// What is not at one of its names now may be at the other by the time that is looked at, so the log's own comes twice.
		for _, name := range append(append([]string{t.String()}, files...), t.String()) {
			st, err := os.Lstat(name)
			if err != nil || !st.Mode().IsRegular() || inodeOf(st) != inode {
				continue
			}
			f, err := os.OpenFile(name, os.O_RDWR|os.O_APPEND|syscall.O_NOFOLLOW, 0)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if st, err := f.Stat(); err == nil && inodeOf(st) == inode {
				return f, nil
			}
			f.Close()
		}
	}
	return nil, fs.ErrNotExist
}

func inodeOf(st fs.FileInfo) uint64 {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return sys.Ino
	}
	return 0
}

// tailSize is more than one batch can become in a log, in bytes: a record is at most 50 bytes longer than its frame, whose least size is 25.
const tailSize = 4 * batchSize

// tail cuts off a torn last line, which only a killed process can have left, and returns the end of what is whole.
func tail(f *os.File) ([]byte, error) {
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

// isDiskTrouble says whether an error is the disk's, which may pass, and not a wrong path's.
func isDiskTrouble(err error) bool {
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, syscall.EROFS, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ESTALE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
