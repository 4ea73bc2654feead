package driver

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// batchSize is the most that one peek shows, in bytes: 16 pages, a pipe's usual size (pipe(7)).
	batchSize = 64 << 10
	// fifoSize is what a container can print while no process reads, in bytes. Only privileged
	// processes may go beyond /proc/sys/fs/pipe-max-size, 1 MiB by default.
	fifoSize = 256 << 10
	// growInterval is how often a pipe that got less than batchSize is asked to grow.
	growInterval = 10 * time.Second
)

// scratch is the memory of a batch: a pipe for tee(2), and buffers.
type scratch struct {
	read, write int // ends of the pipe
	null        int // /dev/null, where consumed frames go
	size        int // of the pipe, in bytes: less than batchSize when root's pipe pages are used up
	grown       time.Time
	limit       int // Config.pipeSize
	in, out     []byte
	ends        []int // in out: the end of each frame's lines
	dirty       bool  // the pipe may not be empty
}

// newScratch returns buffers. limit is Config.pipeSize.
func newScratch(limit int) (*scratch, error) {
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

	b := &scratch{
		read:  fds[0],
		write: fds[1],
		null:  null,
		limit: limit,
		in:    make([]byte, batchSize),
	}

	b.grow()

	return b, nil
}

// grow asks the kernel for a pipe of batchSize, at most every growInterval. The kernel gives two
// pages only (one before Linux 5.14) while a user without CAP_SYS_RESOURCE and CAP_SYS_ADMIN has
// more than fs.pipe-user-pages-soft (pipe(7)).
func (b *scratch) grow() {
	if b.size < batchSize && time.Since(b.grown) > growInterval {
		b.grown = time.Now()
		b.size = growPipe(b.write, batchSize, b.limit)
	}
}

// growPipe asks for a pipe's capacity and returns the capacity that it has then, in bytes. limit is
// Config.pipeSize.
func growPipe(fd, want, limit int) int {
	have, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0)
	if limit > 0 {
		want = limit
	}
	if err != nil || have >= want && limit == 0 {
		return have
	}

	if got, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, want); err == nil {
		return got
	}

	return have
}

// empty reads the rest of the pipe and drops it.
func (b *scratch) empty() error {
	for {
		n, err := retry(func() (int64, error) { k, err := unix.Read(b.read, b.in); return int64(k), err })
		if errors.Is(err, unix.EAGAIN) {
			b.dirty = false
			return nil
		}

		if err != nil || n == 0 {
			return errors.Join(err, io.ErrUnexpectedEOF)
		}
	}
}

// small returns 1 for a pipe's capacity that is less than usual, else 0.
func small(size int) int {
	if size > 0 && size < batchSize {
		return 1
	}
	return 0
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

// peek copies the bytes in a FIFO and leaves them there. io.EOF means that the FIFO is empty and
// not open for writing.
func (b *scratch) peek(fifo int) ([]byte, error) {
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

// waitingIn returns the number of bytes in a FIFO, 0 if that cannot be known.
func waitingIn(fifo int) int {
	n, err := unix.IoctlGetInt(fifo, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
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
