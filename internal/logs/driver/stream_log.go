package driver

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"time"
)

// checkInterval is the interval between two checks for a deleted log, and between two attempts to
// open one. Just after a rotation each batch checks the log, because the lines of a reverted
// rotation exist only in this process.
const checkInterval = time.Second

// ensureLogLocked opens the log if it is closed, or was deleted with its directory.
func (s *stream) ensureLogLocked() error {
	if s.log != nil {
		return s.ensureLinkedLocked()
	}
	if time.Since(s.checked) < checkInterval {
		return s.losses.openErr
	}

	s.checked = time.Now()
	s.losses.openErr = s.openLogLocked()
	s.saveEntryLocked()

	return s.losses.openErr
}

// ensureLinkedLocked checks whether the open log has been deleted or replaced.
func (s *stream) ensureLinkedLocked() error {
	if time.Since(s.checked) < checkInterval && time.Since(s.rotated) >= settleTime {
		return nil
	}

	s.checked = time.Now()
	if !isUnlinked(s.log) {
		return nil
	}

	err := s.undoRotationLocked()
	if err == nil && isUnlinked(s.log) {
		err = s.openLogLocked()
	}

	s.saveEntryLocked()

	return err
}

// openLogLocked opens a new log at its path. On error the old file stays open.
func (s *stream) openLogLocked() error {
	f, planted, err := s.entry.Log.open()
	if err != nil {
		return err
	}

	if planted != nil {
		s.logger.Warn("replaced a foreign file at the path of a container's log", "err", planted)
	}

	return s.writeToLocked(f)
}

// writeToLocked makes f the current log.
func (s *stream) writeToLocked(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}

	if s.log != nil {
		s.log.Close()
	}

	s.log, s.checked = f, time.Now()
	s.entry.Inode, s.entry.Before = inodeOf(st), 0

	return nil
}

// saveEntryLocked updates the table's entry.
func (s *stream) saveEntryLocked() {
	if err := s.table.save(&s.entry); err != nil {
		s.logger.Warn("cannot update the log-driver's table; lines may be duplicated after a crash", "err", err)
	}
}

// reconcileLocked continues after a killed process: it consumes frames already written, but not yet
// consumed. Call it before run.
func (s *stream) reconcileLocked() {
	var written []byte // the end of the log
	var err error
	late := s.guardLocked(0, func() {
		err = s.continueInLocked(s.entry.Inode, s.entry.Before, func(f *os.File) (err error) {
			written, err = readTail(f)
			return err
		})
		err = errors.Join(err, s.table.save(&s.entry))
	})
	if !late && len(written) > 0 { // otherwise nothing is written, or everything is consumed
		err = errors.Join(err, s.skipWrittenLocked(written))
	}

	if err != nil {
		s.logger.Warn("cannot reconcile a container's log; lines may be duplicated", "err", err)
	}
}

// takeOver continues in the file of an earlier stream of the container, if there was one.
func (s *stream) takeOver(old entry) error {
	s.lock()
	defer s.unlock()
	return s.continueInLocked(old.Inode, old.Before, nil)
}

// continueInLocked opens the file with an inode, whatever its current name. After a rename by the
// kubelet the file stays in use until Reopen, since the kubelet may rename it back over any file at
// the log's path. A new file is opened only if the old one was deleted. before is the file in use
// before the last rotation. inspect, if not nil, receives the file first.
func (s *stream) continueInLocked(inode, before uint64, inspect func(*os.File) error) error {
	f, err := s.entry.Log.openByInode(inode)
	switch {
	case err == nil:
		if inspect != nil {
			err = inspect(f)
		}
		err = errors.Join(err, s.writeToLocked(f))
	case errors.Is(err, fs.ErrNotExist):
		err, before = nil, inode
	}

	if s.log == nil {
		if openErr := s.openLogLocked(); openErr != nil {
			s.losses.openErr = openErr // a later batch opens the log
			return errors.Join(err, openErr)
		}
	}

	s.recordRenameLocked(before)

	return err
}

// skipWrittenLocked consumes the frames already present at the end of a log.
func (s *stream) skipWrittenLocked(written []byte) error {
	b, err := s.buffers.get()
	if err != nil {
		return err
	}
	defer s.buffers.put(b)

	if s.spill.size > 0 {
		return s.skipSpillLocked(b, written)
	}

	waiting, err := b.peek(s.fifo)
	if errors.Is(err, errEmpty) || errors.Is(err, io.EOF) {
		return nil
	}

	if err != nil {
		return err
	}

	_, _ = b.render(&s.clock, waiting) // the first batch returns the error again

	return b.consume(s.fifo, framesSize(waiting, b.countWritten(written)))
}

// skipSpillLocked clears the spill if its frame is already present at the end of a log. The bytes
// in the FIFO follow that frame, so none of them has been written.
func (s *stream) skipSpillLocked(b *scratch, written []byte) error {
	text, err := s.spill.read(b.in)
	if err != nil {
		return err
	}

	if _, _ = b.render(&s.clock, text); b.countWritten(written) == 0 {
		return nil
	}

	return s.spill.clear()
}
