package driver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// spill holds one frame that no peek can show as a whole. A pipe without its usual 16 pages (see
// scratch.grow) holds less than a line of Docker's, so the writer waits for room while the reader
// waits for the rest. The frame then moves into a small file of the table, piece by piece:
// splice(2) writes a piece and takes it out of the FIFO in one call, so a process that is killed
// leaves every byte either in the FIFO or in the file. If the file cannot be written, the pieces
// are kept in memory, and only a kill in that moment loses them.
type spill struct {
	path   string
	file   *os.File // nil before the first use
	size   int      // of the pieces, in bytes
	head   [prefixSize]byte
	memory []byte // not nil: the pieces, since the file cannot be written
}

// spillSuffix ends the name of a spill's file; the beginning is the FIFO's name.
const spillSuffix = ".part"

// openSpill returns the spill with the file path. Pieces that an earlier process left in it are
// taken up.
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
		err = fmt.Errorf("%s is not the beginning of a frame: %d bytes", s.path, st.Size())
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

// missing returns how many bytes the frame lacks: first of its length, then of its content.
// errMalformed means that the length cannot be one of Docker's.
func (s *spill) missing() (int, error) {
	if s.size < prefixSize {
		return prefixSize - s.size, nil
	}

	size := binary.BigEndian.Uint32(s.head[:])
	if size > maxFrame {
		return 0, fmt.Errorf("%w: %d bytes", errMalformed, size)
	}

	n := prefixSize + int(size) - s.size
	if n < 0 { // another process has written the file, or a loss of power has torn it
		return 0, fmt.Errorf("%w: a frame of %d bytes in a file of %d", errMalformed, prefixSize+int(size), s.size)
	}

	return n, nil
}

// fill moves pieces out of the FIFO until the frame is whole, and no byte beyond it. errNothing and
// io.EOF are as of scratch.peek; fill then goes on at the next call.
func (s *spill) fill(fifo int) error {
	for {
		n, err := s.missing()
		if err != nil || n == 0 {
			return err
		}

		switch n, err = s.move(fifo, n); {
		case errors.Is(err, unix.EAGAIN):
			return errNothing
		case err != nil:
			return fmt.Errorf("take a piece of a frame out of the FIFO: %w", err)
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
			return int(moved), s.account(int(moved))
		}

		if errors.Is(err, unix.EAGAIN) {
			return 0, err
		}
	}

	if err := s.toMemory(); err != nil {
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

// account notes that n more bytes are in the file.
func (s *spill) account(n int) (err error) {
	at := s.size
	s.size += n
	if at < prefixSize && n > 0 {
		_, err = s.file.ReadAt(s.head[at:min(s.size, prefixSize)], int64(at))
	}
	return err
}

// create makes the file unless it is open.
func (s *spill) create() (err error) {
	if s.file == nil {
		s.file, err = os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	}
	return err
}

// toMemory goes on without the file, which is emptied: the next piece would not fit it.
func (s *spill) toMemory() error {
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

// clear consumes the pieces.
func (s *spill) clear() error {
	if s.memory == nil && s.size > 0 {
		if err := s.file.Truncate(0); err != nil {
			return err
		}
	}
	s.size, s.memory = 0, nil
	return nil
}

// clearWhole clears the spill if its frame is whole.
func (s *spill) clearWhole() error {
	if n, err := s.missing(); err != nil || n > 0 {
		return nil //nolint:nilerr // fill meets the error again
	}
	return s.clear()
}

// remove removes the file with the pieces in it.
func (s *spill) remove() error {
	s.close()
	s.size, s.memory = 0, nil
	return removeExisting(s.path)
}

// close keeps the file for the next process.
func (s *spill) close() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}
