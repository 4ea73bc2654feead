package driver

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

const (
	// batchSize is how much is looked at at once, in bytes; 16 pages, a pipe's usual size (pipe(7)).
	batchSize = 64 << 10
	// fifoSize is what a container can print while nobody reads, in bytes. Only privileged processes may go beyond
	// /proc/sys/fs/pipe-max-size, 1 MiB by default.
	fifoSize = 256 << 10
)

// scratch is what a batch is worked on in: a pipe for tee(2), and buffers.
type scratch struct {
	read, write int // ends of the pipe
	null        int // /dev/null, where consumed frames go
	in, out     []byte
	ends        []int // in out: the end of each frame's lines
	dirty       bool  // something may be left in the pipe
}

func newScratch() (*scratch, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	null, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, fmt.Errorf("open /dev/null: %w", err)
	}
	return &scratch{read: fds[0], write: fds[1], null: null, in: make([]byte, batchSize)}, nil
}

func (b *scratch) close() {
	for _, fd := range []int{b.read, b.write, b.null} {
		unix.Close(fd)
	}
}

var (
	errNothing = errors.New("nothing waits in the FIFO")
	errCut     = errors.New("only the beginning of a frame waits in the FIFO")
)

// look copies what waits in a FIFO and leaves it there. io.EOF means that it is empty and that nobody has it open for writing.
func (b *scratch) look(fifo int) ([]byte, error) {
	n, err := retry(func() (int64, error) { return unix.Tee(fifo, b.write, batchSize, unix.SPLICE_F_NONBLOCK) })
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil, errNothing
	case err != nil:
		return nil, fmt.Errorf("tee: %w", err)
	case n == 0:
		return nil, io.EOF
	}
	b.dirty = true
	for at := 0; at < int(n); {
		k, err := retry(func() (int64, error) { k, err := unix.Read(b.read, b.in[at:n]); return int64(k), err })
		if err != nil || k == 0 {
			return nil, fmt.Errorf("read a copy: %w", errors.Join(err, io.ErrUnexpectedEOF))
		}
		at += int(k)
	}
	b.dirty = false
	return b.in[:n], nil
}

// consume takes n bytes out of a FIFO.
func (b *scratch) consume(fifo, n int) error {
	for n > 0 {
		k, err := retry(func() (int64, error) {
			k, err := unix.Splice(fifo, nil, b.null, nil, n, unix.SPLICE_F_NONBLOCK)
			return int64(k), err
		})
		if err != nil || k == 0 {
			return fmt.Errorf("consume: %w", errors.Join(err, io.ErrUnexpectedEOF))
		}
		n -= int(k)
	}
	return nil
}

// retry repeats a call that a signal interrupted.
func retry(call func() (int64, error)) (int64, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
