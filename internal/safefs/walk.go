package safefs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of a Walker's resources, whatever it encounters.
const (
	maxOpenDirs   = 16      // descriptors of directories above the current one
	maxNames      = 256     // pending names of subdirectories
	maxNameBytes  = 1 << 20 // all such names together
	maxDepth      = 100_000 // levels of directories; each takes 24 bytes
	direntBuffer  = 32 << 10
	stepsPerCheck = 16 // directories between two checks of the time
)

// direntBuffers saves allocating a buffer for each walk. Most walks are of directories with a few
// files.
var direntBuffers = sync.Pool{New: func() any { return new([direntBuffer]byte) }}

// Walker visits a directory tree that may change during the walk. It moves between directories by
// descriptor, so it neither follows links nor leaves the file system of its first directory, and a
// path may exceed PATH_MAX. It can pause at any time, and holds few descriptors and little memory
// meanwhile.
//
// A Walker is not safe for concurrent use. Close releases its descriptors.
type Walker struct {
	// Dir is called for each directory, the first one included, before its entries. An error ends
	// the walk.
	Dir func(fd int, st *unix.Stat_t) error
	// File is called for each entry except directories. It may be nil.
	File func(st *unix.Stat_t)
	// Check is called every few directories. An error pauses the walk. It may be nil.
	Check func() error
	// MaxEntries ends the walk after this many directory entries; 0 means no limit.
	MaxEntries uint64

	root    int
	dev     uint64
	stack   []level
	fds     []openDir // descriptors of the top levels of stack
	names   []string  // names of all levels, those of the top level last
	bytes   int       // of names
	room    int       // maxNameBytes, except in tests
	buf     []byte
	entries uint64
	partial bool
	begun   bool
}

// level is a directory in progress.
type level struct {
	ino    uint64
	offset int64 // getdents offset of the next read; atEnd after the last entry
	names  int32 // subdirectories still to be visited
}

// atEnd is not a valid offset on any file system.
const atEnd = math.MinInt64

// openDir is a descriptor with its read offset.
type openDir struct {
	fd int
	at int64
}

// NewWalker starts a walk at the directory dir. The caller may close dir.
func NewWalker(dir *os.File) (*Walker, error) {
	w := &Walker{room: maxNameBytes}
	var err error
	if w.root, err = openSubdir(int(dir.Fd()), "."); err != nil {
		return nil, fmt.Errorf("walk %s: %w", dir.Name(), err)
	}
	return w, nil
}

// Close ends the walk. It may be called more than once.
func (w *Walker) Close() {
	w.closeLevels()
	if w.root >= 0 {
		_ = unix.Close(w.root) // it was only read
	}
	w.root = -1
}

// Partial reports whether the walk is incomplete: it reached MaxEntries or another limit, or a
// directory was moved and the walk could not return to its parent.
func (w *Walker) Partial() bool { return w.partial }

// Walk continues the walk. It returns true when everything is visited, and false at the time until.
// The error is that of Check or Dir.
func (w *Walker) Walk(until time.Time) (done bool, err error) {
	if !w.begun {
		w.begun = true
		if err := w.begin(); err != nil {
			return true, err
		}
	}

	buf := direntBuffers.Get().(*[direntBuffer]byte)
	w.buf = buf[:]
	defer func() {
		w.buf = nil
		direntBuffers.Put(buf)
	}()

	for step := 1; len(w.stack) > 0; step++ {
		if step%stepsPerCheck == 0 {
			if w.Check != nil {
				if err := w.Check(); err != nil {
					return false, err
				}
			}

			if time.Now().After(until) {
				return false, nil
			}
		}

		if w.MaxEntries > 0 && w.entries >= w.MaxEntries {
			w.partial = true
			return true, nil
		}

		top := &w.stack[len(w.stack)-1]
		switch {
		case top.names > 0:
			err = w.enter(top)
		case top.offset != atEnd:
			w.read(top)
		default:
			w.leave()
		}

		if err != nil {
			return true, err
		}
	}

	return true, nil
}

// begin visits the first directory.
func (w *Walker) begin() error {
	fd, err := openSubdir(w.root, ".")
	if err != nil {
		return err
	}

	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return errors.Join(err, unix.Close(fd))
	}

	w.dev = uint64(st.Dev)

	return w.push(fd, &st)
}

// enter visits the next subdirectory of the top level. It skips subdirectories that were removed or
// replaced, and mount points.
func (w *Walker) enter(top *level) error {
	name := w.popName(top)
	fd, err := openSubdir(w.fds[len(w.fds)-1].fd, name)
	if err != nil {
		w.partial = w.partial || !isChanged(err)
		return nil
	}

	var st unix.Stat_t
	// A subvolume of btrfs is not a mount. It has its own device, and its inode numbers overlap
	// with those of other subvolumes.
	if err := unix.Fstat(fd, &st); err != nil || uint64(st.Dev) != w.dev {
		_ = unix.Close(fd)
		return nil
	}

	if len(w.stack) == maxDepth {
		w.partial = true
		_ = unix.Close(fd)
		return nil
	}

	return w.push(fd, &st)
}

// isChanged reports whether the directory no longer exists under its name on this file system.
func isChanged(err error) bool {
	for _, changed := range []error{unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.EXDEV} {
		if errors.Is(err, changed) {
			return true
		}
	}
	return false
}

func (w *Walker) push(fd int, st *unix.Stat_t) error {
	w.stack = append(w.stack, level{ino: st.Ino})
	if len(w.fds) == maxOpenDirs {
		_ = unix.Close(w.fds[0].fd)
		w.fds = append(w.fds[:0], w.fds[1:]...)
	}
	w.fds = append(w.fds, openDir{fd: fd})
	return w.Dir(fd, st)
}

// leave returns to the parent directory. If its descriptor was closed meanwhile, leave opens "..".
// After a concurrent move this may be another directory, and the walk then restarts.
func (w *Walker) leave() {
	child := w.fds[len(w.fds)-1].fd
	defer unix.Close(child) //nolint:errcheck // it was only read

	w.stack, w.fds = w.stack[:len(w.stack)-1], w.fds[:len(w.fds)-1]
	if len(w.stack) == 0 || len(w.fds) > 0 {
		return
	}

	fd, err := unix.Openat(child, "..", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil {
		var st unix.Stat_t
		if err = unix.Fstat(fd, &st); err == nil && uint64(st.Dev) == w.dev && st.Ino == w.stack[len(w.stack)-1].ino {
			w.fds = append(w.fds, openDir{fd: fd})
			return
		}
		_ = unix.Close(fd)
	}

	w.restart()
}

// restart abandons the directories between the first and the current one.
func (w *Walker) restart() {
	w.partial = true
	for len(w.stack) > 1 {
		top := &w.stack[len(w.stack)-1]
		for top.names > 0 {
			w.popName(top)
		}
		w.stack = w.stack[:len(w.stack)-1]
	}

	fd, err := openSubdir(w.root, ".")
	if err != nil {
		w.closeLevels()
		return
	}

	w.fds = append(w.fds, openDir{fd: fd})
}

// read reads some entries of the top level. It visits files and stores the names of subdirectories.
func (w *Walker) read(top *level) {
	dir := &w.fds[len(w.fds)-1]
	if dir.at != top.offset {
		if _, err := unix.Seek(dir.fd, top.offset, unix.SEEK_SET); err != nil {
			w.partial, top.offset = true, atEnd
			return
		}
	}

	n, err := unix.Getdents(dir.fd, w.buf)
	if errors.Is(err, unix.EINTR) {
		return
	}

	if err != nil || n <= 0 { // ENOENT for a removed directory
		w.partial = w.partial || err != nil && !isChanged(err)
		top.offset = atEnd
		return
	}

	dir.at = math.MinInt64 + 1 // unknown until the buffer is consumed
	for b := w.buf[:n]; len(b) > 0; {
		e := parseEntry(b)
		b = b[e.size:]
		if e.name != "." && e.name != ".." && !w.take(top, dir.fd, e) {
			return
		}

		top.offset = e.next
		if top.names == maxNames {
			return
		}
	}

	dir.at = top.offset
}

// take visits an entry or stores its name. It returns false if there is no room for the name.
func (w *Walker) take(top *level, dir int, e entry) bool {
	kind := e.kind
	if kind == unix.DT_UNKNOWN || kind != unix.DT_DIR && w.File != nil {
		var st unix.Stat_t
		if unix.Fstatat(dir, e.name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			return true // removed
		}

		kind = unix.DT_DIR
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			w.entries++
			if w.File != nil {
				w.File(&st)
			}
			return true
		}
	}

	if kind != unix.DT_DIR {
		w.entries++
		return true
	}

	if top.names > 0 && w.bytes+len(e.name) > w.room {
		return false
	}

	w.entries++
	top.names++
	w.names, w.bytes = append(w.names, e.name), w.bytes+len(e.name)

	return true
}

func (w *Walker) popName(top *level) string {
	name := w.names[len(w.names)-1]
	w.names, w.bytes = w.names[:len(w.names)-1], w.bytes-len(name)
	top.names--
	return name
}

func (w *Walker) closeLevels() {
	for _, d := range w.fds {
		_ = unix.Close(d.fd)
	}
	w.fds, w.stack, w.names, w.bytes = nil, nil, nil, 0
}

// openSubdir opens a directory beneath another one for reading. It refuses links and mount points.
func openSubdir(dir int, name string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: beneath | unix.RESOLVE_NO_XDEV,
	}
	return Openat2(dir, name, &how)
}

// entry is a directory entry of getdents64(2).
type entry struct {
	next int64 // offset of the next entry
	size int
	kind byte
	name string
}

// parseEntry parses the first entry of a buffer filled by the kernel.
func parseEntry(b []byte) entry {
	const header = 19 // d_ino, d_off, d_reclen, d_type
	e := entry{
		next: int64(binary.NativeEndian.Uint64(b[8:])),
		size: int(binary.NativeEndian.Uint16(b[16:])),
		kind: b[18],
	}

	name := b[header:e.size]
	for i, c := range name {
		if c == 0 {
			name = name[:i]
			break
		}
	}

	e.name = string(name)

	return e
}
