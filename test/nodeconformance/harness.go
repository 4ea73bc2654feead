package main

import (
	"fmt"
	"os"
)

// harness is the TB of the nodes.
type harness struct {
	cleanup []func()
	failed  bool
}

func (*harness) Helper()                         {}
func (*harness) Logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
func (h *harness) Failed() bool                  { return h.failed }
func (h *harness) Cleanup(f func())              { h.cleanup = append(h.cleanup, f) }

// Fatalf ends the node and the program.
func (h *harness) Fatalf(format string, args ...any) {
	if h.failed {
		return // while ending
	}
	h.failed = true
	h.Logf(format, args...)
	h.end()
	os.Exit(1)
}

// end ends what was started, newest first.
func (h *harness) end() {
	for i := len(h.cleanup) - 1; i >= 0; i-- {
		h.cleanup[i]()
	}
	h.cleanup = nil
}
