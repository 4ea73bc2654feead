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

// ErrUnknown is returned for a container without a log stream.
var ErrUnknown = errors.New("the container has no log stream")

// If the kubelet gets no response to a rotation, because the daemon or this process was killed, it
// renames the old log back over the new one. This would lose the lines of the new log. So nothing
// is written to the new log at first. Lines written later are saved when the kubelet reverts the
// rotation.
const (
	// holdTime is the time without writes after Reopen. The kubelet renames at once if the call
	// fails.
	holdTime = 100 * time.Millisecond
	// settleTime is the time without writes if the daemon disconnects during holdTime. It is also
	// the time to check the log while no output arrives.
	settleTime = 3 * time.Second
)

var (
	errHolding  = errors.New("writes are on hold after a log rotation")
	errSettling = errors.New("the FIFO is empty after a recent log rotation")
)

// reopen starts a new file, unless the current one has not been renamed. It waits for an earlier
// operation on a disk that does not respond until ctx ends.
func (s *stream) reopen(ctx context.Context) error {
	if err := s.lockFor(ctx); err != nil {
		return fmt.Errorf("the disk does not respond: %w", err)
	}
	defer s.unlock()

	if s.closed {
		return ErrUnknown
	}

	var err error
	s.guardLocked(0, func() {
		if err = s.rotateLocked(); err == nil {
			s.saveEntryLocked()
		}
	})
	if err == nil {
		s.changed.notify()
	}

	return err
}

func (s *stream) rotateLocked() error {
	if s.log != nil {
		if err := s.undoRotationLocked(); err != nil {
			return err
		}
	}

	before := s.entry.Inode
	if err := s.openLogLocked(); err != nil {
		return err
	}

	s.recordRenameLocked(before)

	return nil
}

// recordRenameLocked records the file the kubelet may rename back over the log.
func (s *stream) recordRenameLocked(before uint64) {
	if before == 0 || before == s.entry.Inode {
		return
	}
	s.entry.Before, s.rotated, s.checked = before, time.Now(), time.Time{}
}

// isHoldingLocked reports whether writes are still on hold.
func (s *stream) isHoldingLocked() bool {
	since := time.Since(s.rotated)
	disconnected := s.disconnected.Load()
	// A daemon disconnected during holdTime may not have responded to the kubelet.
	isLost := disconnected != nil && !disconnected.Before(s.rotated) &&
		disconnected.Sub(s.rotated) < holdTime
	return since < holdTime || isLost && since < settleTime
}

// undoRotationLocked handles a rotation reverted by the kubelet: the earlier log has been renamed
// back over the current one. It appends the lines written since the rotation to the earlier file
// and continues there, whatever its name is now: the kubelet may have renamed it again meanwhile.
// Otherwise it does nothing. On error nothing changes. The log must be open.
func (s *stream) undoRotationLocked() error {
	if s.entry.Before == 0 || !isUnlinked(s.log) {
		return nil
	}

	f, err := s.entry.Log.openByInode(s.entry.Before)
	if errors.Is(err, fs.ErrNotExist) { // both were deleted
		return nil
	}

	if err != nil {
		return err
	}

	if reverted, err := s.isRevertedLocked(f); err != nil || !reverted {
		return errors.Join(err, f.Close())
	}

	if err := appendAll(f, s.log); err != nil {
		return errors.Join(err, f.Close())
	}

	return s.writeToLocked(f)
}

// isRevertedLocked reports whether the kubelet has renamed the earlier file since the rotation.
// Otherwise somebody has deleted the current file, and its lines remain deleted. A rename changes
// the time of a file's last status change (inode(7)).
func (s *stream) isRevertedLocked(before *os.File) (bool, error) {
	if before.Name() == s.entry.Log.String() {
		return true, nil
	}

	st, err := fstat(before)
	if err != nil {
		return false, err
	}

	return time.Unix(st.Ctim.Unix()).After(s.rotated), nil
}

// isUnlinked reports whether a file no longer has a name.
func isUnlinked(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink == 0
}

// appendAll appends a file to another one, completely or not at all.
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
