// Package output holds the output of execs that comes from the containerd shim directly, and not
// through the engine. The engine then has no output, apart from its message for a command that
// failed to start. See annotation.OutputVariable.
package output

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/annotation"
)

const (
	// pipeSize is the size of a FIFO in bytes (F_SETPIPE_SZ, fcntl(2)). A FIFO of the usual size
	// holds less than one read.
	pipeSize = 256 << 10
	// After the exit of a command its background processes may hold the output open. The session
	// ends after trailingIdle without output, and after trailingTimeout in any case. The engine
	// itself ends a session 2 s after the exit.
	trailingIdle    = 2 * time.Second
	trailingTimeout = 5 * time.Second
)

// CopyFunc copies to the end of the data.
type CopyFunc func(to io.Writer, from io.Reader) error

// Output is the output of one exec.
type Output struct {
	token   string
	pipes   []*pipe        // of stdout and stderr
	readers sync.WaitGroup // one for each pipe
	started bool

	// idle is trailingIdle, and timeout is trailingTimeout. Tests shorten them.
	idle, timeout time.Duration
}

// pipe is a FIFO. This program keeps both ends open, so that the output does not end before the
// shim has opened the FIFO.
type pipe struct {
	path        string
	read, write *os.File
	idle        time.Duration
	end         atomic.Pointer[time.Time] // after the exit of the command, nil before
	err         error                     // of the reader; set before Output.readers has ended
}

// Open creates the FIFOs of an exec in dir, a directory that only root can change. It creates the
// directory if needed. The caller must call Close.
func Open(dir string) (_ *Output, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("output of the command: %w", err)
	}

	o := &Output{token: rand.Text(), idle: trailingIdle, timeout: trailingTimeout}
	defer func() {
		if err != nil {
			o.Close()
		}
	}()

	for _, name := range annotation.OutputFiles(o.token) {
		p, err := openPipe(filepath.Join(dir, name))
		if err != nil {
			return nil, fmt.Errorf("output of the command: %w", err)
		}
		p.idle = o.idle
		o.pipes = append(o.pipes, p)
	}

	return o, nil
}

// Variable returns the environment variable of the exec for the shim.
func (o *Output) Variable() string { return annotation.OutputVariable + "=" + o.token }

// Start copies the output to two writers, which are called concurrently. After an error of a writer
// it calls failed, and discards the remaining output: the command continues without its client.
func (o *Output) Start(stdout, stderr io.Writer, copyAll CopyFunc, failed func(error)) {
	o.started = true
	for i, to := range []io.Writer{stdout, stderr} {
		p := o.pipes[i]
		o.readers.Go(func() {
			defer p.remove()
			if p.err = copyAll(to, p); p.err != nil {
				failed(p.err)
				_ = copyAll(io.Discard, p) // it ends with the command
			}
		})
	}
}

// Finish waits until the writers have the remaining output of a command that has exited. The error
// is that of a writer, or the cause of ctx.
func (o *Output) Finish(ctx context.Context) error {
	end := time.Now().Add(o.timeout)
	for _, p := range o.pipes {
		_ = p.write.Close() // nothing was written
		p.end.Store(&end)
		p.limit(end)
	}

	done := make(chan struct{})
	go func() { o.readers.Wait(); close(done) }()

	select {
	case <-done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}

	return errors.Join(o.pipes[0].err, o.pipes[1].err)
}

// Close ends the session. Readers continue to the end of the output, so that a command without a
// client is not blocked.
func (o *Output) Close() {
	for _, p := range o.pipes {
		if o.started {
			_ = p.write.Close() // nothing was written
		} else {
			p.remove()
		}
	}
}

func openPipe(path string) (_ *pipe, err error) {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}

	p := &pipe{path: path}
	defer func() {
		if err != nil {
			p.remove()
		}
	}()

	if p.read, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return nil, err
	}
	if p.write, err = os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
		return nil, err
	}

	conn, err := p.read.SyscallConn()
	if err != nil {
		return nil, err
	}

	return p, conn.Control(func(fd uintptr) { // a smaller FIFO is only slower
		_, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize)
	})
}

// remove closes both ends, which discards unread output, and removes the FIFO.
func (p *pipe) remove() {
	for _, f := range []*os.File{p.read, p.write} {
		if f != nil {
			_ = f.Close() // nothing was written
		}
	}
	_ = os.Remove(p.path)
}

// Read implements io.Reader. Background processes do not delay the end of the output for long.
func (p *pipe) Read(b []byte) (int, error) {
	if end := p.end.Load(); end != nil {
		p.limit(*end)
	}

	n, err := p.read.Read(b)
	if p.end.Load() != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		err = io.EOF
	}

	return n, err
}

// limit sets the deadline of the next read, or of the current one.
func (p *pipe) limit(end time.Time) {
	deadline := time.Now().Add(p.idle)
	if end.Before(deadline) {
		deadline = end
	}
	_ = p.read.SetReadDeadline(deadline) // without an effect after the end of the output
}
