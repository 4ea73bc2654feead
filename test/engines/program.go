package engines

import (
	"fmt"
	"os"
	"sync"
)

// Program is the TB of programs, which have no testing.T. Its zero value can be used.
type Program struct {
	mu      sync.Mutex
	cleanup []func()
	failed  bool
}

// Helper does nothing.
func (*Program) Helper() {}

// Logf writes to stderr.
func (*Program) Logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// Failed says whether Fatalf was called.
func (p *Program) Failed() bool { return p.failed }

// Cleanup keeps what End is to do.
func (p *Program) Cleanup(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cleanup = append(p.cleanup, f)
}

// Fatalf ends what was started, and then the program with 1.
func (p *Program) Fatalf(format string, args ...any) {
	if p.failed {
		return // while ending
	}
	p.failed = true
	p.Logf(format, args...)
	p.End()
	os.Exit(1)
}

// End ends what was started, newest first.
func (p *Program) End() {
	for i := len(p.cleanup) - 1; i >= 0; i-- {
		p.cleanup[i]()
	}
	p.cleanup = nil
}
