package engines

import (
	"fmt"
	"os"
	"sync"
)

// Program is the TB of programs without a testing.T. The zero value is ready to use.
type Program struct {
	mu      sync.Mutex
	cleanup []func()
	failed  bool
}

// Helper does nothing.
func (*Program) Helper() {}

// Logf writes to stderr.
func (*Program) Logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// Failed reports whether Fatalf was called.
func (p *Program) Failed() bool { return p.failed }

// Cleanup registers a function for End.
func (p *Program) Cleanup(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cleanup = append(p.cleanup, f)
}

// Fatalf ends everything started, and then the program with exit code 1.
func (p *Program) Fatalf(format string, args ...any) {
	if p.failed {
		return // already ending
	}
	p.failed = true
	p.Logf(format, args...)
	p.End()
	os.Exit(1)
}

// End calls the cleanup functions, newest first.
func (p *Program) End() {
	for i := len(p.cleanup) - 1; i >= 0; i-- {
		p.cleanup[i]()
	}
	p.cleanup = nil
}
