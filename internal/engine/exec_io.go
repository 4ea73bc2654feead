package engine

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/text"
)

// outputBuffer is the size in bytes of the reads of output. The engine sends messages of up to 32 KiB.
const outputBuffer = 64 << 10

var outputReaders = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, outputBuffer) }}

// transfer copies between a hijacked connection and streams until the output ends or ctx does, and
// closes the connection. The copy of stdin may outlive it, blocked in a read of the caller's, which
// ends when the caller closes its side.
func transfer(ctx context.Context, conn client.HijackedResponse, s Streams, resize func(context.Context, Size) error) error {
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
	r := outputReaders.Get().(*bufio.Reader)
	r.Reset(conn)
	defer func() {
		r.Reset(nil)
		outputReaders.Put(r)
	}()

	if !s.TTY {
		return demultiplex(out, errOut, r)
	}
	for {
		switch _, err := copySome(out, r, outputBuffer, 1); {
		case err == io.EOF: //nolint:errorlint // io.Reader's contract
			return nil
		case err != nil:
			return err
		}
	}
}

// demultiplex separates the messages of stdout and stderr: a byte for the stream, three of zero, the
// length in four, and the data (package stdcopy). It copies straight out of r's buffer.
func demultiplex(out, errOut io.Writer, r *bufio.Reader) error {
	const header = 8
	whole := maxStartText // the first message may be the engine's own; see execOutput
	for {
		head, err := r.Peek(header)
		switch {
		case err == io.EOF && len(head) == 0: //nolint:errorlint // io.Reader's contract
			return nil
		case err != nil:
			return broken(err)
		}
		stream, left := stdcopy.StdType(head[0]), int64(binary.BigEndian.Uint32(head[4:]))
		_, _ = r.Discard(header)

		var to io.Writer
		switch stream {
		case stdcopy.Stdin, stdcopy.Stdout:
			to = out
		case stdcopy.Stderr:
			to = errOut
		case stdcopy.Systemerr:
			said, _ := io.ReadAll(io.LimitReader(r, min(left, maxStartText)))
			return fmt.Errorf("the engine reports: %s", text.Clean(string(said), text.MaxMessage))
		default:
			return fmt.Errorf("the engine sent a message of unknown stream %d", stream)
		}
		for ; left > 0; whole = 1 {
			n, err := copySome(to, r, left, int(min(left, int64(whole))))
			if err != nil {
				return broken(err)
			}
			left -= int64(n)
		}
	}
}

// broken makes the end of a stream inside a message an error of its own.
func broken(err error) error {
	if errors.Is(err, io.EOF) {
		return errIncomplete
	}
	return err
}

// copySome writes at most limit bytes of r's buffer, once it has as many as least.
func copySome(w io.Writer, r *bufio.Reader, limit int64, least int) (int, error) {
	if _, err := r.Peek(least); err != nil {
		return 0, err
	}
	p, _ := r.Peek(int(min(limit, int64(r.Buffered())))) // it is buffered
	if _, err := w.Write(p); err != nil {
		return 0, err
	}
	return r.Discard(len(p))
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
