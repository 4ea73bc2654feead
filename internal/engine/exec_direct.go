package engine

import (
	"context"
	"io"
)

// startDirect starts the copying of the output from the shim, if it comes from there. It returns
// the streams for the engine, whose writers then take turns with those of the shim.
func (r *execution) startDirect(session context.Context, s Streams, fail context.CancelCauseFunc) Streams {
	if r.direct == nil {
		return s
	}

	turn := make(chan struct{}, 1)
	s.Stdout = exclusiveWriter{session, s.Stdout, turn}
	s.Stderr = exclusiveWriter{session, s.Stderr, turn}
	r.direct.Start(s.Stdout, s.Stderr, copyDirect, fail)

	return s
}

// finishDirect waits for the remaining output from the shim of a command that has exited.
func (r *execution) finishDirect(session context.Context) error {
	if r.direct == nil {
		return nil
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
