package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/text"
)

// outputBuffer is the size in bytes of the reads of output. The engine sends messages of up to 32
// KiB.
const outputBuffer = 128 << 10

var outputBuffers = sync.Pool{New: func() any { return new([outputBuffer]byte) }}

// transfer copies between a hijacked connection and streams until the output ends or ctx does, and
// closes the connection. The copy of stdin may outlive it, blocked in a read of the caller's, which
// ends when the caller closes its side.
func transfer(
	ctx context.Context, conn client.HijackedResponse, s Streams, resize func(context.Context, Size) error,
) error {
	defer conn.Close()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	if s.Stdin != nil {
		go func() {
			_, _ = io.Copy(conn.Conn, s.Stdin) // its end, however it came, is passed on
			_ = conn.CloseWrite()
		}()
	}

	if s.Resize != nil {
		go follow(ctx, s.Resize, resize)
	}

	ended := make(chan error, 1)
	go func() { ended <- copyOutput(conn.Conn, s) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		conn.Close() // ends the copy of the output
		<-ended
		return context.Cause(ctx)
	}
}

// copyOutput copies what the engine sends until its end.
func copyOutput(conn io.Reader, s Streams) error {
	out, errOut := s.Stdout, s.Stderr
	if out == nil {
		out = io.Discard
	}
	if errOut == nil {
		errOut = io.Discard
	}

	buf := outputBuffers.Get().(*[outputBuffer]byte)
	defer outputBuffers.Put(buf)

	conn = &gatherer{Reader: conn}
	if !s.TTY {
		d := demultiplexer{r: conn, buf: buf[:], out: out, errOut: errOut}
		return d.run()
	}

	for {
		n, err := conn.Read(buf[:])
		if n > 0 {
			if _, err := out.Write(buf[:n]); err != nil {
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

// gatherTime is how long small pieces of a fast stream may wait for more. Each piece wakes up the
// daemon and the client up to twice.
const gatherTime = 100 * time.Microsecond

// maxRests bounds how many readers rest at a time: each takes a thread. Where many read, data
// gathers by itself.
const maxRests = 4

var rests atomic.Int32

// gatherer is a reader that lets data gather while it comes fast, in pieces smaller than the reads.
// A piece that comes alone does not wait.
type gatherer struct {
	io.Reader
	last  time.Time // when the last read returned
	small bool      // it returned less than was asked for
}

func (g *gatherer) Read(p []byte) (int, error) {
	if g.small && time.Since(g.last) < gatherTime {
		rest(gatherTime)
	}
	n, err := g.Reader.Read(p)
	g.last, g.small = time.Now(), n < len(p)
	return n, err
}

// rest sleeps, unless many do. A timer of the runtime would take a millisecond, in which the
// engine's socket fills up.
func rest(d time.Duration) {
	defer rests.Add(-1)
	if rests.Add(1) <= maxRests {
		ts := unix.NsecToTimespec(int64(d))
		_ = unix.Nanosleep(&ts, nil) // shorter if a signal comes
	}
}

// A message of the engine is a byte for the stream, three of zero, the length in four, and the data
// (package stdcopy).
const messageHeader = 8

// demultiplexer separates the messages of stdout and stderr. Messages that arrive together and
// follow each other on one stream are written together.
type demultiplexer struct {
	r           io.Reader
	out, errOut io.Writer
	buf         []byte
	data        []byte // of buf, that was read and not handled

	stream stdcopy.StdType // of the message whose data comes next
	left   int64           // bytes of it
}

// run copies until the end of the output.
func (d *demultiplexer) run() error {
	for first := true; ; first = false {
		if err := d.header(); err != nil {
			if err == io.EOF && len(d.data) == 0 { //nolint:errorlint // io.Reader's contract
				return nil
			}
			return broken(err)
		}

		if first { // the message may be the engine's own; see execOutput
			if err := d.need(int(min(d.left, maxStartText))); err != nil {
				return broken(err)
			}
		}

		for d.left > 0 {
			if err := d.copySome(first); err != nil {
				return broken(err)
			}
		}
	}
}

// header reads the header of the next message.
func (d *demultiplexer) header() error {
	if err := d.need(messageHeader); err != nil {
		return err
	}

	d.stream, d.left = stdcopy.StdType(d.data[0]), int64(binary.BigEndian.Uint32(d.data[4:]))
	d.data = d.data[messageHeader:]
	switch d.stream {
	case stdcopy.Stdin, stdcopy.Stdout, stdcopy.Stderr:
		return nil
	case stdcopy.Systemerr:
		_ = d.need(int(min(d.left, maxStartText)))
		said := d.data[:min(d.left, maxStartText, int64(len(d.data)))]
		return fmt.Errorf("the engine reports: %s", text.Clean(string(said), text.MaxMessage))

	default:
		return fmt.Errorf("the engine sent a message of unknown stream %d", d.stream)
	}
}

// copySome writes data of the message that has arrived, with that of the messages behind it if they
// are for the same stream, unless the message is to be alone.
func (d *demultiplexer) copySome(alone bool) error {
	if err := d.need(1); err != nil {
		return err
	}

	n := min(d.left, int64(len(d.data)))
	out, rest := d.data[:n], d.data[n:]
	d.left -= n
	for !alone && d.left == 0 && len(rest) > messageHeader && stdcopy.StdType(rest[0]) == d.stream {
		d.left = int64(binary.BigEndian.Uint32(rest[4:]))
		n := min(d.left, int64(len(rest)-messageHeader))
		out = append(out, rest[messageHeader:messageHeader+n]...) // within the buffer, over the header
		rest = rest[messageHeader+n:]
		d.left -= n
	}

	d.data = rest
	to := d.out
	if d.stream == stdcopy.Stderr {
		to = d.errOut
	}

	_, err := to.Write(out)

	return err
}

// need reads until n bytes have arrived. io.EOF is an end before the first of them.
func (d *demultiplexer) need(n int) error {
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

// broken makes the end of a stream inside a message an error of its own.
func broken(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errIncomplete
	}
	return err
}

// follow passes terminal sizes on. The first one may come before the engine has started the
// process, so each is tried for a while.
func follow(ctx context.Context, sizes <-chan Size, resize func(context.Context, Size) error) {
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
