package engine

import (
	"context"
	"io"

	"github.com/moby/moby/client"
)

// transfer copies the input and the output to the end of the output, which comes from the engine,
// from the shim, or from both.
func (r *execution) transfer(ctx context.Context, conn client.HijackedResponse, s Streams) error {
	if r.direct == nil {
		return transfer(ctx, conn, s, true, r.resize)
	}

	// A failure of a writer ends the session, but does not cancel it (see endFunc).
	session, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	turn := make(chan struct{}, 1)
	s.Stdout = exclusiveWriter{session, s.Stdout, turn}
	s.Stderr = exclusiveWriter{session, s.Stderr, turn}
	r.direct.Start(s.Stdout, s.Stderr, copyDirect, cancel)
	if err := transfer(session, conn, s, true, r.resize); err != nil {
		return err
	}

	// The engine has closed the connection: the command has exited, or the engine is stopping.
	if _, err := r.wait(session); err != nil {
		return wrap(err, "wait for exit")
	}

	if r.OnExit != nil {
		r.OnExit()
	}

	return r.direct.Finish(session)
}

// copyDirect copies output from the shim.
func copyDirect(to io.Writer, from io.Reader) error {
	buf := outputBuffers.Get().(*[outputBufferSize]byte)
	defer outputBuffers.Put(buf)

	return copyAll(to, &coalescingReader{Reader: from}, buf[:])
}

// exclusiveWriter lets one of several writers write at a time.
type exclusiveWriter struct {
	ctx context.Context
	io.Writer
	turn chan struct{} // holds one element during a write
}

// Write implements io.Writer.
func (w exclusiveWriter) Write(b []byte) (int, error) {
	select {
	case w.turn <- struct{}{}:
	case <-w.ctx.Done():
		return 0, context.Cause(w.ctx)
	}
	defer func() { <-w.turn }()

	return w.Writer.Write(b)
}
