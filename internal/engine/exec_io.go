package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/text"
)

// outputBufferSize is the size in bytes of reads of output. The engine sends messages of up to 32
// KiB.
const outputBufferSize = 128 << 10

var outputBuffers = sync.Pool{New: func() any { return new([outputBufferSize]byte) }}

// transfer copies between a hijacked connection and streams until the end of the output or of ctx,
// and closes the connection. It passes on the end of the input if endInput is set. The goroutine
// for stdin may still block in a read after transfer returns. It ends when the caller closes stdin.
func transfer(
	ctx context.Context, conn client.HijackedResponse, s Streams, endInput bool,
	resize func(context.Context, Size) error,
) error {
	defer conn.Close()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	if s.Stdin != nil {
		go func() {
			_, _ = io.Copy(conn.Conn, s.Stdin) // pass on the end of the input, even after an error
			if endInput {
				_ = conn.CloseWrite()
			}
		}()
	}

	if s.Resize != nil {
		go followSizes(ctx, s.Resize, resize)
	}

	done := make(chan error, 1)
	go func() { done <- copyOutput(conn.Conn, s) }()

	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		_ = conn.Conn.Close() // ends copyOutput
		<-done                //nolint:errcheck // the cause of the cancellation matters
		return context.Cause(ctx)
	}
}

// copyOutput copies the output from the engine to its end.
func copyOutput(conn io.Reader, s Streams) error {
	out, errOut := s.Stdout, s.Stderr
	if out == nil {
		out = io.Discard
	}
	if errOut == nil {
		errOut = io.Discard
	}

	buf := outputBuffers.Get().(*[outputBufferSize]byte)
	defer outputBuffers.Put(buf)

	conn = &coalescingReader{Reader: conn}
	if !s.TTY {
		d := demultiplexer{r: conn, buf: buf[:], out: out, errOut: errOut}
		return d.run()
	}

	return copyAll(out, conn, buf[:])
}

// copyAll copies to the end of the data. Unlike io.Copy it always uses the buffer.
func copyAll(to io.Writer, from io.Reader, buf []byte) error {
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
		}

		switch {
		case err == io.EOF: //nolint:errorlint // io.Reader's contract
			return nil
		case err != nil:
			return err
		}
	}
}

// Reads of a fast stream are delayed, so that each one gets much: each piece wakes up the daemon
// and the client up to twice. The delay adapts to the stream, so that reads fill half of their
// buffer or more. The engine's socket holds about 200 KiB or 200 messages. If it is full, the
// engine merges further pieces.
const (
	minDelay = 100 * time.Microsecond
	maxDelay = 800 * time.Microsecond
)

// maxSleepers bounds the number of sleeping readers, because each one occupies a thread. With many
// readers, pieces coalesce without a delay.
const maxSleepers = 4

var sleepers atomic.Int32

// coalescingReader delays reads while data arrives fast and in small pieces, so that pieces
// accumulate. It does not delay a single piece. A reset is an end like any other: the engine resets
// the connection of a command that exits before it has read its input.
type coalescingReader struct {
	io.Reader
	last  time.Time     // of the end of the last read
	full  bool          // the last read has filled its buffer
	delay time.Duration // of the next read, 0 before the first one
}

func (r *coalescingReader) Read(p []byte) (int, error) {
	if !r.full && time.Since(r.last) < r.delay {
		sleep(r.delay)
	}

	n, err := r.Reader.Read(p)
	r.last, r.full = time.Now(), n == len(p)
	switch {
	case r.full:
		r.delay = max(minDelay, r.delay/2)
	case n < len(p)/2:
		r.delay = min(maxDelay, max(minDelay, 2*r.delay))
	}

	if errors.Is(err, syscall.ECONNRESET) { // input is unread; all output was delivered (unix(7))
		err = io.EOF
	}

	return n, err
}

// sleep sleeps, unless too many goroutines do. It does not use a timer of the Go runtime, because
// that takes a millisecond, and the engine's socket would fill up in this time.
func sleep(d time.Duration) {
	defer sleepers.Add(-1)
	if sleepers.Add(1) <= maxSleepers {
		ts := unix.NsecToTimespec(int64(d))
		_ = unix.Nanosleep(&ts, nil) // a signal may end it early
	}
}

// messageHeader is the size of the header of the engine's messages: one byte for the stream, three
// zero bytes, and the length of the data in four bytes (package stdcopy).
const messageHeader = 8

// demultiplexer separates the messages of stdout and stderr. It combines consecutive messages of
// one stream into one write if they arrive together.
type demultiplexer struct {
	r           io.Reader
	out, errOut io.Writer
	buf         []byte
	data        []byte // unprocessed part of buf

	stream    stdcopy.StdType // of the current message
	remaining int64           // unprocessed bytes of the current message
}

// run copies to the end of the output.
func (d *demultiplexer) run() error {
	for first := true; ; first = false {
		if err := d.header(); err != nil {
			if err == io.EOF && len(d.data) == 0 { //nolint:errorlint // io.Reader's contract
				return nil
			}
			return truncationError(err)
		}

		if first { // it may be an error message of the engine; see execOutput
			if err := d.fill(int(min(d.remaining, maxStartText))); err != nil {
				return truncationError(err)
			}
		}

		for d.remaining > 0 {
			if err := d.copyData(first); err != nil {
				return truncationError(err)
			}
		}
	}
}

// header reads the header of the next message.
func (d *demultiplexer) header() error {
	if err := d.fill(messageHeader); err != nil {
		return err
	}

	d.stream, d.remaining = stdcopy.StdType(d.data[0]), int64(binary.BigEndian.Uint32(d.data[4:]))
	d.data = d.data[messageHeader:]
	switch d.stream {
	case stdcopy.Stdin, stdcopy.Stdout, stdcopy.Stderr:
		return nil
	case stdcopy.Systemerr:
		_ = d.fill(int(min(d.remaining, maxStartText)))
		message := d.data[:min(d.remaining, maxStartText, int64(len(d.data)))]
		return fmt.Errorf("engine reported: %s", text.Clean(string(message), text.MaxMessage))

	default:
		return fmt.Errorf("engine sent a message for unknown stream %d", d.stream)
	}
}

// copyData writes the available data of the current message. Unless alone is set, it includes
// directly following messages for the same stream.
func (d *demultiplexer) copyData(alone bool) error {
	if err := d.fill(1); err != nil {
		return err
	}

	n := min(d.remaining, int64(len(d.data)))
	out, rest := d.data[:n], d.data[n:]
	d.remaining -= n
	for !alone && d.remaining == 0 && len(rest) > messageHeader && stdcopy.StdType(rest[0]) == d.stream {
		d.remaining = int64(binary.BigEndian.Uint32(rest[4:]))
		n := min(d.remaining, int64(len(rest)-messageHeader))
		out = append(out, rest[messageHeader:messageHeader+n]...) // within the buffer, over the header
		rest = rest[messageHeader+n:]
		d.remaining -= n
	}

	d.data = rest
	to := d.out
	if d.stream == stdcopy.Stderr {
		to = d.errOut
	}

	_, err := to.Write(out)

	return err
}

// fill reads until data has at least n bytes. It returns io.EOF at the end of the output.
func (d *demultiplexer) fill(n int) error {
	if len(d.data) >= n {
		return nil
	}

	d.data = d.buf[:copy(d.buf, d.data)]
	for len(d.data) < n {
		free := d.data[len(d.data):cap(d.data)]
		k, err := d.r.Read(free)
		d.data = d.data[:len(d.data)+k]
		if err != nil && len(d.data) < n {
			return err
		}
	}

	return nil
}

// truncationError replaces the end of the stream inside a message by errIncomplete.
func truncationError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errIncomplete
	}
	return err
}

// followSizes applies terminal sizes. The first one may arrive before the engine has started the
// process, so it retries each one for a while.
func followSizes(ctx context.Context, sizes <-chan Size, resize func(context.Context, Size) error) {
	for {
		select {
		case <-ctx.Done():
			return
		case s, ok := <-sizes:
			if !ok {
				return
			}

			for try := 0; try < 20 && resize(ctx, s) != nil; try++ {
				select {
				case <-ctx.Done():
					return
				case <-time.After(50 * time.Millisecond):
				}
			}
		}
	}
}
