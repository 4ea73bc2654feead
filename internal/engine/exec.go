package engine

import "io"

// Size is a terminal's size in characters.
type Size struct{ Width, Height uint16 }

// Streams is where the streams of an exec or attach go.
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
}
