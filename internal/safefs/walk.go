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

// Bounds of what a Walker holds, whatever it meets.
const (
	maxOpenDirs   = 16      // descriptors of directories above the current one
	maxNames      = 256     // names of subdirectories that are read before they are visited
	maxNameBytes  = 1 << 20 // all such names together
	maxDepth      = 100_000 // levels of directories; each takes 24 bytes
	direntBuffer  = 32 << 10
	stepsPerCheck = 16 // directories between two looks at the clock
)

// direntBuffers saves a buffer for each walk: most walks are of directories with a few files.
var direntBuffers = sync.Pool{New: func() any { return new([direntBuffer]byte) }}

// Walker visits a tree of directories that others change meanwhile. It goes from directory to
// directory by descriptor, so it neither follows links nor leaves the file system on which it
// began, and a path may be longer than PATH_MAX. It can pause at any time and hold few descriptors
// and little memory while it does.
//
// A Walker is not safe for concurrent use. Close releases its descriptors.
type Walker struct {
	// Dir is called for each directory, the first one included, before what is in it. An error ends
	// the walk.
	Dir func(fd int, st *unix.Stat_t) error
	// File is called for everything that is not a directory; nil if only directories matter.
	File func(st *unix.Stat_t)
	// Check is called every few directories; an error pauses the walk. nil for none.
	Check func() error
	// MaxEntries ends the walk after so many directory entries; 0 for no limit.
	MaxEntries uint64

	root    int
	dev     uint64
	stack   []level
	fds     []openDir // of the uppermost levels of stack
	names   []string  // of the stack's levels, those of the top last
	bytes   int       // of names
	room    int       // maxNameBytes, but in tests
	buf     []byte
	entries uint64
	partial bool
	begun   bool
}

// level is a directory whose visit has not ended.
type level struct {
	ino    uint64
	offset int64 // where reading goes on, as getdents has it; atEnd after the last entry
	names  int32 // subdirectories that were read and are still to be visited
}

// atEnd is no offset of any file system.
const atEnd = math.MinInt64

// openDir is a descriptor and the offset up to which it has been read.
type openDir struct {
	fd int
	at int64
}

// NewWalker begins a walk at the directory dir, which the caller may close.
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

// Partial says whether the walk has left something out: MaxEntries or a bound of the Walker was
// reached, or a directory was moved so that the way back from it was lost.
func (w *Walker) Partial() bool { return w.partial }

// Walk goes on until everything is visited, and returns true then, or until the time until. The
// error is that of Check or Dir.
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

// enter visits the next subdirectory of the top. One that has been removed or replaced, or on which
// something is mounted, is left out.
func (w *Walker) enter(top *level) error {
	name := w.popName(top)
	fd, err := openSubdir(w.fds[len(w.fds)-1].fd, name)
	if err != nil {
		w.partial = w.partial || !isChanged(err)
		return nil
	}

	var st unix.Stat_t
	// A subvolume of btrfs is no mount and has a device of its own, with the inode numbers of
	// others.
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

// isChanged says that there is no directory of that name on this file system any more.
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

// leave goes back to the directory above. If that was closed meanwhile it is opened as "..", which
// may be another one if somebody has moved the directory: then the walk goes on at its beginning.
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

// restart gives up the directories between the first one and the current one.
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

// read takes in some entries of the top: files are visited, names of subdirectories are kept.
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

	if err != nil || n <= 0 { // a directory that has been removed is ENOENT
		w.partial = w.partial || err != nil && !isChanged(err)
		top.offset = atEnd
		return
	}

	dir.at = math.MinInt64 + 1 // unknown until the buffer has been used up
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

// take visits an entry or keeps its name. It returns false if there is no room for the name.
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

// openSubdir opens one directory beneath another one for reading: no link, and not the root of
// another mount.
func openSubdir(dir int, name string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: beneath | unix.RESOLVE_NO_XDEV,
	}
	return Openat2(dir, name, &how)
}

// entry is a directory entry as getdents64(2) has it.
type entry struct {
	next int64 // offset of the one after it
	size int
	kind byte
	name string
}

// parseEntry parses the first entry of a buffer that the kernel has filled.
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
