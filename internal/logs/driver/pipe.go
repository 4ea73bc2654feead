package driver

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// batchSize is the maximum size of a peek, in bytes: 16 pages, the default capacity of a pipe
	// (pipe(7)).
	batchSize = 64 << 10
	// fifoSize is the amount of output, in bytes, a container can write while no process reads.
	// Only privileged processes may exceed /proc/sys/fs/pipe-max-size, 1 MiB by default.
	fifoSize = 256 << 10
	// growInterval is the interval between two attempts to grow a pipe smaller than batchSize.
	growInterval = 10 * time.Second
)

// scratch holds the buffers of a batch, including a pipe for tee(2).
type scratch struct {
	read, write int // ends of the pipe
	null        int // /dev/null, the target of consumed frames
	size        int // of the pipe, in bytes; less than batchSize if root's pipe pages are exhausted
	lastGrow    time.Time
	limit       int // Config.pipeSize
	in, out     []byte
	ends        []int // offsets in out: the end of each frame's lines
	dirty       bool  // the pipe may not be empty
}

// newScratch returns new buffers. limit is Config.pipeSize.
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

// grow requests a pipe of batchSize, at most every growInterval. The kernel limits a pipe to two
// pages (one before Linux 5.14) if a user without CAP_SYS_RESOURCE and CAP_SYS_ADMIN exceeds
// fs.pipe-user-pages-soft (pipe(7)).
func (b *scratch) grow() {
	if b.size < batchSize && time.Since(b.lastGrow) > growInterval {
		b.lastGrow = time.Now()
		b.size = growPipe(b.write, batchSize, b.limit)
	}
}

// growPipe requests a capacity for a pipe and returns the resulting capacity, in bytes. limit is
// Config.pipeSize.
func growPipe(fd, want, limit int) int {
	size, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0)
	if limit > 0 {
		want = limit
	}
	if err != nil || size >= want && limit == 0 {
		return size
	}

	if got, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, want); err == nil {
		return got
	}

	return size
}

// empty reads and drops the content of the pipe.
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

// countSmall returns 1 for a capacity below the usual one, and 0 otherwise.
func countSmall(size int) int {
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
	errEmpty      = errors.New("the FIFO is empty")
	errIncomplete = errors.New("the FIFO has an incomplete frame")
)

// peek copies the bytes in a FIFO without consuming them. It returns io.EOF for an empty FIFO
// without a writer.
func (b *scratch) peek(fifo int) ([]byte, error) {
	n, err := retry(func() (int64, error) { return unix.Tee(fifo, b.write, batchSize, unix.SPLICE_F_NONBLOCK) })
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil, errEmpty
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

// consume removes n bytes from a FIFO.
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

// pendingBytes returns the number of bytes in a FIFO, or 0 if it is unknown.
func pendingBytes(fifo int) int {
	n, err := unix.IoctlGetInt(fifo, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
}

// retry repeats a call interrupted by a signal.
func retry(call func() (int64, error)) (int64, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
