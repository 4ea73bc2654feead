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

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// ErrUnknown is the error of a container whose output is not being written.
var ErrUnknown = errors.New("the container's output is not being written")

// A caller of Reopen that gets no answer, since the daemon or this process was killed, renames the old log back over the new one. Whatever
// the new one holds by then would be lost. So nothing is written to it at first, and what is written later is saved when it happens.
const (
	rest    = 100 * time.Millisecond // after Reopen nothing is written; the kubelet renames at once when the call fails
	settled = 3 * time.Second        // so long nothing is written if the daemon goes during the rest; and the log is looked after also while nothing comes
)

var (
	errResting  = errors.New("nothing is written for a moment after a rotation")
	errSettling = errors.New("nothing waits; the log was rotated a moment ago")
)

// Reopen opens the log of a container anew at its path, which the kubelet has renamed before (CRI ReopenContainerLog): later lines are
// written to a new file. ErrUnknown if the container's output is not being written. On error the old file is written further.
func (d *Driver) Reopen(ctx context.Context, container string) error {
	container = text.Clean(container, text.MaxName)
	s := d.of(model.ContainerID(container)) // only looked up
	if s == nil {
		return fmt.Errorf("reopen log of container %s: %w", container, ErrUnknown)
	}
	if err := s.lockFor(ctx); err != nil {
		return fmt.Errorf("reopen log of container %s: the disk does not answer: %w", container, err)
	}
	defer s.unlock()
	err := ErrUnknown
	if !s.closed {
		err = s.rotate()
	}
	if err != nil {
		return fmt.Errorf("reopen log of container %s: %w", container, err)
	}
	s.changed.tell()
	s.note()
	return nil
}

// rotate begins a new file unless nobody has renamed the one that is written. The lock is held.
func (s *stream) rotate() error {
	if s.log != nil {
		if err := s.undoRotation(true); err != nil {
			return err
		}
	}
	before := s.entry.Inode
	if err := s.openLog(); err != nil {
		return err
	}
	s.renamedFrom(before)
	return nil
}

// renamedFrom notes which file the kubelet may rename back over the log. The lock is held, or nobody else knows the stream.
func (s *stream) renamedFrom(before uint64) {
	if before == 0 || before == s.entry.Inode {
		return
	}
	s.entry.Before, s.rotated, s.checked = before, time.Now(), time.Time{}
}

// resting says whether nothing is to be written yet. The lock is held.
func (s *stream) resting() bool {
	since := time.Since(s.rotated)
	left := s.d.left.Load()
	lost := left != nil && !left.Before(s.rotated) && left.Sub(s.rotated) < rest // the daemon had perhaps not answered
	return since < rest || lost && since < settled
}

// undoRotation follows a kubelet that has renamed the earlier log back over the one that is written: it saves what has been written since
// by appending it to the earlier one, which is written further. With renamed, also if that has been renamed again meanwhile. Otherwise it
// does nothing. On error all is as before. The lock is held and the log is open.
func (s *stream) undoRotation(renamed bool) error {
	if s.entry.Before == 0 || !unlinked(s.log) {
		return nil
	}
	f, err := s.entry.Log.byInode(s.entry.Before)
	if errors.Is(err, fs.ErrNotExist) { // deleted, both
		return nil
	}
	if err != nil {
		return err
	}
	if !renamed && f.Name() != s.entry.Log.String() { // ours was deleted, and the earlier one stands where the kubelet has put it
		return f.Close()
	}
	if err := appendAll(f, s.log); err != nil {
		return errors.Join(err, f.Close())
	}
	return s.writeTo(f)
}

// unlinked says whether a file has no name any more.
func unlinked(f *os.File) bool {
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
