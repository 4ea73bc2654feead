package driver

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"time"
)

// checkInterval is how often to check a log that somebody may have deleted, and how often to try to
// open one that cannot be opened.
const checkInterval = time.Second

// ensureLogLocked opens a log that is not open, or was deleted with its directory.
func (s *stream) ensureLogLocked() error {
	if s.log != nil {
		return s.ensureThereLocked()
	}
	if time.Since(s.checked) < checkInterval {
		return s.losses.openErr
	}

	s.checked = time.Now()
	s.losses.openErr = s.openLogLocked()
	s.keepEntryLocked()

	return s.losses.openErr
}

// ensureThereLocked checks a log that is open, and may have been deleted or renamed over.
func (s *stream) ensureThereLocked() error {
	if time.Since(s.checked) < checkInterval {
		return nil
	}

	s.checked = time.Now()
	if !isUnlinked(s.log) {
		return nil
	}

	err := s.undoRotationLocked(false)
	if err == nil && isUnlinked(s.log) {
		err = s.openLogLocked()
	}

	s.keepEntryLocked()

	return err
}

// openLogLocked opens the log anew, at its path. On error the old file stays open.
func (s *stream) openLogLocked() error {
	f, planted, err := s.entry.Log.open()
	if err != nil {
		return err
	}

	if planted != nil {
		s.logger.Warn("a foreign file in the place of a container's log is replaced", "err", planted)
	}

	return s.writeToLocked(f)
}

// writeToLocked makes f the log from now on.
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

// keepEntryLocked writes the table's entry anew.
func (s *stream) keepEntryLocked() {
	if err := s.table.keep(&s.entry); err != nil {
		s.logger.Warn("lines may be written twice to a container's log after the next crash", "err", err)
	}
}

// reconcile goes on where a killed process ended: it finds frames that had been written and not yet
// consumed, and consumes them. It comes before run.
func (s *stream) reconcile() error {
	s.lock()
	defer s.unlock()
	err := s.goOnInLocked(s.entry.Inode, s.entry.Before, s.skipWrittenLocked)
	return errors.Join(err, s.table.keep(&s.entry))
}

// succeed goes on in the file that an earlier stream of the container has written, if there was
// one.
func (s *stream) succeed(old entry) error {
	s.lock()
	defer s.unlock()
	return s.goOnInLocked(old.Inode, old.Before, nil)
}

// goOnInLocked opens the file with an inode, whatever its name is now: after a rename by the
// kubelet it is written until Reopen, since the kubelet may rename it back over whatever stands
// there. Another file is opened only if it was deleted. before is the file that was written
// earlier. inspect, if not nil, gets the file first.
func (s *stream) goOnInLocked(inode, before uint64, inspect func(*os.File) error) error {
	f, err := s.entry.Log.byInode(inode)
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
			s.losses.openErr = openErr // the log comes when it can
			return errors.Join(err, openErr)
		}
	}

	s.renamedFromLocked(before)

	return err
}

// skipWrittenLocked consumes the frames that stand at the end of f already.
func (s *stream) skipWrittenLocked(f *os.File) error {
	written, err := tail(f)
	if err != nil {
		return err
	}

	b, err := s.buffers.take()
	if err != nil {
		return err
	}
	defer s.buffers.give(b)

	if s.spill.size > 0 {
		return s.skipSpillLocked(b, written)
	}

	waiting, err := b.peek(s.fifo)
	if errors.Is(err, errNothing) || errors.Is(err, io.EOF) {
		return nil
	}

	if err != nil {
		return err
	}

	_, _ = b.render(&s.clock, waiting) // the first batch meets its error again

	return b.consume(s.fifo, framesIn(waiting, b.alreadyWritten(written)))
}

// skipSpillLocked clears the spill if its frame stands at the end of a log already. The bytes in
// the FIFO come behind it, so nothing of them has been written.
func (s *stream) skipSpillLocked(b *scratch, written []byte) error {
	text, err := s.spill.read(b.in)
	if err != nil {
		return err
	}

	if _, _ = b.render(&s.clock, text); b.alreadyWritten(written) == 0 {
		return nil
	}

	return s.spill.clear()
}
