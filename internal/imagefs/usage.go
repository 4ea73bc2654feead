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

// Usage is what files take.
type Usage struct {
	Bytes  uint64 // allocated by the file system
	Inodes uint64
	// Partial says that there is more: a walk has reached one of its limits, or is still under way.
	Partial bool
}

func (u *Usage) add(other Usage) {
	u.Bytes += other.Bytes
	u.Inodes += other.Inodes
	u.Partial = u.Partial || other.Partial
}

// blockSize is the unit of st_blocks, whatever the file system's own (stat(3type)).
const blockSize = 512

// Limits of one walk. A walk that reaches one is partial.
const (
	maxEntries  = 100_000_000
	maxWalkTime = 10 * time.Minute // of walking, without the pauses
)

// walk adds up what a layer takes. Whoever runs in the container may change the layer meanwhile.
type walk struct {
	*safefs.Walker // nil once it has ended, and for a file
	whole          Usage
	// A file with several names counts at each of them with its share. So it counts once, without a
	// table of the files that were seen: such a table would grow with what a container makes.
	// The names of a file are all in one layer, since no link leads from one overlay to another.
	sharedBytes, sharedInodes float64

	spent time.Duration
}

// newWalk begins the walk of a layer, which lies at name beneath root. A layer that has been
// removed takes nothing.
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

	if st.Mode&unix.S_IFMT != unix.S_IFDIR { // a blob of containerd's
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

// count adds a file at one of its names.
func (w *walk) count(st *unix.Stat_t) {
	bytes := uint64(st.Blocks) * blockSize
	if st.Nlink <= 1 {
		w.whole.add(Usage{Bytes: bytes, Inodes: 1})
		return
	}
	w.sharedBytes += float64(bytes) / float64(st.Nlink)
	w.sharedInodes += 1 / float64(st.Nlink)
}

// run goes on for slice. It returns true when the walk has ended; errors are check's, which is nil
// for none.
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

// usage is what has been counted so far.
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

// device is the file system of what lies at name beneath root, 0 if it is not there.
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
