package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrUnknown is the error of a container whose output is not being written.
var ErrUnknown = errors.New("the container's output is not being written")

// A caller of Reopen that gets no answer, since the daemon or this process was killed, renames the
// old log back over the new one. Lines that the new one holds by then would be lost. So nothing is
// written to it at first, and lines that are written later are saved when it happens.
const (
	// restTime is how long nothing is written after Reopen. The kubelet renames at once when the
	// call fails.
	restTime = 100 * time.Millisecond
	// settleTime is how long nothing is written if the daemon disconnects during restTime, and how
	// long the log is checked while nothing arrives.
	settleTime = 3 * time.Second
)

var (
	errResting  = errors.New("nothing is written for a moment after a rotation")
	errSettling = errors.New("nothing waits; the log was rotated a moment ago")
)

// reopen begins a new file unless nobody has renamed the one that is written. It waits for a disk
// that does not answer until ctx ends.
func (s *stream) reopen(ctx context.Context) error {
	if err := s.lockFor(ctx); err != nil {
		return fmt.Errorf("the disk does not answer: %w", err)
	}
	defer s.unlock()

	if s.closed {
		return ErrUnknown
	}
	if err := s.rotateLocked(); err != nil {
		return err
	}

	s.changed.notify()
	s.keepEntryLocked()

	return nil
}

func (s *stream) rotateLocked() error {
	if s.log != nil {
		if err := s.undoRotationLocked(true); err != nil {
			return err
		}
	}

	before := s.entry.Inode
	if err := s.openLogLocked(); err != nil {
		return err
	}

	s.renamedFromLocked(before)

	return nil
}

// renamedFromLocked notes which file the kubelet may rename back over the log.
func (s *stream) renamedFromLocked(before uint64) {
	if before == 0 || before == s.entry.Inode {
		return
	}
	s.entry.Before, s.rotated, s.checked = before, time.Now(), time.Time{}
}

// isRestingLocked reports whether nothing is to be written yet.
func (s *stream) isRestingLocked() bool {
	since := time.Since(s.rotated)
	left := s.left.Load()
	// A daemon that disconnected during restTime has perhaps not answered the kubelet.
	isLost := left != nil && !left.Before(s.rotated) && left.Sub(s.rotated) < restTime
	return since < restTime || isLost && since < settleTime
}

// undoRotationLocked follows a kubelet that has renamed the earlier log back over the one that is
// written: it appends the lines written since to the earlier one, which is written further. With
// renamed, also if that has been renamed again meanwhile. Otherwise it does nothing. On error all
// is as before. The log is open.
func (s *stream) undoRotationLocked(renamed bool) error {
	if s.entry.Before == 0 || !isUnlinked(s.log) {
		return nil
	}

	f, err := s.entry.Log.byInode(s.entry.Before)
	if errors.Is(err, fs.ErrNotExist) { // deleted, both
		return nil
	}

	if err != nil {
		return err
	}

	if !renamed && f.Name() != s.entry.Log.String() {
		// ours was deleted, and the earlier one stands where the kubelet has put it
		return f.Close()
	}

	if err := appendAll(f, s.log); err != nil {
		return errors.Join(err, f.Close())
	}

	return s.writeToLocked(f)
}

// isUnlinked reports whether a file has no name any more.
func isUnlinked(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink == 0
}

// appendAll appends a file to another, as a whole or not at all.
func appendAll(to, from *os.File) error {
	old, err := to.Stat()
	if err != nil {
		return err
	}

	st, err := from.Stat()
	if err != nil {
		return err
	}

	if _, err := io.Copy(to, io.NewSectionReader(from, 0, st.Size())); err != nil {
		return errors.Join(err, to.Truncate(old.Size()))
	}

	return nil
}
