package engine

import (
	"errors"
	"io"
)

// Size is the size of a terminal in characters.
type Size struct{ Width, Height uint16 }

// Streams are the streams of an exec or attach. Writers must not block after the end of the call's
// context.
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
	// OnExit, if not nil, is called when the command has exited while a writer blocks. The engine
	// drops output not read within 2 s after the exit. The writers must therefore accept the
	// remaining output, at most MaxTrailingOutput bytes, without blocking.
	OnExit func()
	// Output is the container's directory for the output of execs from the shim, "" for none. It
	// has no effect with a terminal.
	Output string
}

// MaxTrailingOutput bounds the output in bytes that may arrive after the exit of a command. For
// each stream it covers the pipe and the FIFO of the shim (64 KiB each), the engine's buffer (1 MB)
// and the buffers of the connection.
const MaxTrailingOutput = 4 << 20

var (
	// ErrClientDisconnected is the cause (context.WithCancelCause) for the end of a session after
	// its client has disconnected. Exec then does not kill the command, like other runtimes, but
	// hangs up a command with a terminal.
	ErrClientDisconnected = errors.New("client disconnected")
	// errIncomplete means that the engine may have dropped output.
	errIncomplete = errors.New("output is incomplete: the engine closed the stream before all output was read")
	// errSetupTimeout means that the engine does not start an exec.
	errSetupTimeout = errors.New("engine did not respond in time")
)
