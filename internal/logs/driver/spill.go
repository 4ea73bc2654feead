package driver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// spill holds one frame too large for a peek. A pipe without its usual 16 pages (see scratch.grow)
// is smaller than a line from Docker, so the writer would wait for room while the reader waits for
// the remaining bytes. The frame then moves into a small file of the table, piece by piece.
// splice(2) writes a piece and removes it from the FIFO in one call, so each byte of a killed
// process is either in the FIFO or in the file. If the file cannot be written, the pieces stay in
// memory, and only a kill at that moment loses them.
type spill struct {
	path   string
	file   *os.File // nil before the first use
	size   int      // total of the pieces, in bytes
	head   [prefixSize]byte
	memory []byte // the pieces if the file cannot be written, otherwise nil
}

// spillSuffix is the suffix of a spill's file name. The FIFO's name precedes it.
const spillSuffix = ".part"

// openSpill returns the spill with the file path. It resumes with the pieces of an earlier process.
func openSpill(path string) (*spill, error) {
	s := &spill{path: path}
	f, err := os.OpenFile(s.path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}

	if err != nil {
		return nil, err
	}

	st, err := f.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Size() > batchSize) {
		err = fmt.Errorf("%s is not a partial frame: %d bytes", s.path, st.Size())
	}

	if err == nil && st.Size() > 0 {
		_, err = f.ReadAt(s.head[:min(st.Size(), prefixSize)], 0)
	}

	if err != nil {
		return nil, errors.Join(err, f.Close())
	}

	s.file, s.size = f, int(st.Size())

	return s, nil
}

// countMissing returns the number of bytes missing from the frame: first from its length, then from
// its content. It returns errMalformed for an invalid length.
func (s *spill) countMissing() (int, error) {
	if s.size < prefixSize {
		return prefixSize - s.size, nil
	}

	size := binary.BigEndian.Uint32(s.head[:])
	if size > maxFrame {
		return 0, fmt.Errorf("%w: %d bytes", errMalformed, size)
	}

	n := prefixSize + int(size) - s.size
	if n < 0 { // written by another process, or damaged by a power failure
		return 0, fmt.Errorf("%w: a frame of %d bytes in a file of %d", errMalformed, prefixSize+int(size), s.size)
	}

	return n, nil
}

// fill moves pieces out of the FIFO until the frame is complete, and no byte beyond it. It returns
// errEmpty and io.EOF like scratch.peek. The next call then continues.
func (s *spill) fill(fifo int) error {
	for {
		n, err := s.countMissing()
		if err != nil || n == 0 {
			return err
		}

		switch n, err = s.move(fifo, n); {
		case errors.Is(err, unix.EAGAIN):
			return errEmpty
		case err != nil:
			return fmt.Errorf("read a piece of a frame from the FIFO: %w", err)
		case n == 0:
			return io.EOF
		}
	}
}

// move moves one piece of at most n bytes.
func (s *spill) move(fifo, n int) (int, error) {
	if s.memory == nil && s.create() == nil {
		at := int64(s.size)
		moved, err := retry(func() (int64, error) {
			k, err := unix.Splice(fifo, nil, int(s.file.Fd()), &at, n, unix.SPLICE_F_NONBLOCK)
			return int64(k), err
		})
		if err == nil {
			return int(moved), s.addSize(int(moved))
		}

		if errors.Is(err, unix.EAGAIN) {
			return 0, err
		}
	}

	if err := s.switchToMemory(); err != nil {
		return 0, err
	}

	buf := make([]byte, n)
	read, err := retry(func() (int64, error) { k, err := unix.Read(fifo, buf); return int64(k), err })
	if err != nil {
		return 0, err
	}

	s.memory = append(s.memory, buf[:read]...)
	copy(s.head[:], s.memory)
	s.size = len(s.memory)

	return int(read), nil
}

// addSize records n more bytes in the file.
func (s *spill) addSize(n int) (err error) {
	at := s.size
	s.size += n
	if at < prefixSize && n > 0 {
		_, err = s.file.ReadAt(s.head[at:min(s.size, prefixSize)], int64(at))
	}
	return err
}

// create creates the file unless it is open.
func (s *spill) create() (err error) {
	if s.file == nil {
		s.file, err = os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	}
	return err
}

// switchToMemory continues without the file and truncates it, because the next piece would not fit.
func (s *spill) switchToMemory() error {
	if s.memory != nil {
		return nil
	}

	memory := make([]byte, s.size, batchSize)
	if s.size > 0 {
		if _, err := s.file.ReadAt(memory, 0); err != nil {
			return err
		}
		if err := s.file.Truncate(0); err != nil {
			return err
		}
	}

	s.memory = memory

	return nil
}

// read copies the pieces into b, which has batchSize bytes.
func (s *spill) read(b []byte) ([]byte, error) {
	if s.memory != nil {
		return b[:copy(b, s.memory)], nil
	}
	if s.size == 0 {
		return b[:0], nil
	}

	_, err := s.file.ReadAt(b[:s.size], 0)

	return b[:s.size], err
}

// clear removes the pieces.
func (s *spill) clear() error {
	if s.memory == nil && s.size > 0 {
		if err := s.file.Truncate(0); err != nil {
			return err
		}
	}
	s.size, s.memory = 0, nil
	return nil
}

// clearComplete clears the spill if its frame is complete.
func (s *spill) clearComplete() error {
	if n, err := s.countMissing(); err != nil || n > 0 {
		return nil //nolint:nilerr // fill returns the error again
	}
	return s.clear()
}

// remove removes the file and its pieces.
func (s *spill) remove() error {
	s.close()
	s.size, s.memory = 0, nil
	return removeExisting(s.path)
}

// close closes the file and keeps it for the next process.
func (s *spill) close() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}
