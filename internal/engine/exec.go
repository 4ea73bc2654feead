package engine

import (
	"errors"
	"io"
)

// Size is a terminal's size in characters.
type Size struct{ Width, Height uint16 }

// Streams is where the streams of an exec or attach go. Writers must not block once the context of
// the call has ended.
type Streams struct {
	TTY            bool
	Stdin          io.Reader // nil: no stdin
	Stdout, Stderr io.Writer // nil: discarded; with TTY everything arrives on Stdout
	Resize         <-chan Size
}

// Exec is a command to run in a container.
type Exec struct {
	Cmd []string
	Streams
	// Ended is called, if it is not nil, when the command has ended while a writer blocks. The
	// engine drops output that is not read within 2 s after the end, so the writers must then take
	// the rest without blocking: at most MaxRest bytes.
	Ended func()
}

// MaxRest bounds in bytes what may still arrive of a command's output after its end: the pipe and
// the FIFO of the shim (64 KiB each), the engine's buffer (1 MB) and the connection's, for each
// stream.
const MaxRest = 4 << 20

var (
	// ErrClientGone is the cause (context.WithCancelCause) with which a session ends whose client
	// is gone or was cut off. Exec then leaves the command alone, like every other runtime. A
	// command with a terminal is hung up.
	ErrClientGone = errors.New("the client is gone")
	// errIncomplete reports output that the engine may have dropped.
	errIncomplete = errors.New("the output is incomplete: the engine closed the stream before it was read to the end")
	// errSilent reports an engine that does not begin an exec.
	errSilent = errors.New("the engine does not answer in time")
)
