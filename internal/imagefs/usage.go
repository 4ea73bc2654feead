package imagefs

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/safefs"
)

// Usage is the disk usage of files.
type Usage struct {
	Bytes  uint64 // allocated by the file system
	Inodes uint64
	// Partial is true if the walk has reached a limit or is unfinished, so that the usage is a
	// lower bound.
	Partial bool
}

func (u *Usage) add(other Usage) {
	u.Bytes += other.Bytes
	u.Inodes += other.Inodes
	u.Partial = u.Partial || other.Partial
}

// blockSize is the unit of st_blocks on every file system (stat(3type)).
const blockSize = 512

// Limits of one walk. A walk reaching one of them is partial.
const (
	maxEntries  = 100_000_000
	maxWalkTime = 10 * time.Minute // of walking, without pauses
)

// walk adds up the usage of a layer. Processes in the container may change the layer during the
// walk.
type walk struct {
	*safefs.Walker // nil after the end, and for a file
	whole          Usage
	// Each name of a file counts as a fraction of it. So a file with several names counts once,
	// without a table of visited files, whose size a container could control. All names of a file
	// are in the same layer, since hard links cannot cross overlays.
	sharedBytes, sharedInodes float64

	spent time.Duration
}

// newWalk starts the walk of the layer name beneath root. A removed layer has no usage.
func newWalk(root *os.File, name string) (*walk, error) {
	w := &walk{}
	f, err := safefs.OpenAt(root, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return w, nil
	}

	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", name, err)
	}
	defer f.Close()

	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("layer %s: %w", name, err)
	}

	if st.Mode&unix.S_IFMT != unix.S_IFDIR { // a blob of containerd
		w.count(&st)
		return w, nil
	}

	if w.Walker, err = safefs.NewWalker(f); err != nil {
		return nil, fmt.Errorf("layer %s: %w", name, err)
	}

	w.File, w.MaxEntries = w.count, maxEntries
	w.Dir = func(_ int, st *unix.Stat_t) error {
		w.whole.add(Usage{Bytes: uint64(st.Blocks) * blockSize, Inodes: 1})
		return nil
	}

	return w, nil
}

// count adds one name of a file.
func (w *walk) count(st *unix.Stat_t) {
	bytes := uint64(st.Blocks) * blockSize
	if st.Nlink <= 1 {
		w.whole.add(Usage{Bytes: bytes, Inodes: 1})
		return
	}
	w.sharedBytes += float64(bytes) / float64(st.Nlink)
	w.sharedInodes += 1 / float64(st.Nlink)
}

// run continues the walk for slice and returns true at its end. Errors come from check, which may
// be nil.
func (w *walk) run(check func() error, slice time.Duration) (ended bool, err error) {
	if w.Walker == nil {
		return true, nil
	}

	began := time.Now()
	w.Check = check
	ended, err = w.Walk(began.Add(slice))
	if err != nil {
		return ended, err
	}

	w.spent += time.Since(began)
	if !ended && w.spent < maxWalkTime {
		return false, nil
	}

	w.whole.Partial = !ended || w.Partial()
	w.close()

	return true, nil
}

// usage returns the usage counted so far.
func (w *walk) usage() Usage {
	u := w.whole
	u.Bytes += uint64(math.Round(w.sharedBytes))
	u.Inodes += uint64(math.Round(w.sharedInodes))
	u.Partial = u.Partial || w.Walker != nil
	return u
}

func (w *walk) close() {
	if w.Walker != nil {
		w.Close()
		w.Walker = nil
	}
}

// device returns the device number of the file system of name beneath root, 0 if it does not exist.
func device(root *os.File, name string) uint64 {
	f, err := safefs.OpenAt(root, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0
	}
	defer f.Close()

	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return 0
	}

	return uint64(st.Dev)
}
