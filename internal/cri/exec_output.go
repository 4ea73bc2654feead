package cri

import (
	"fmt"
	"sync/atomic"

	"github.com/containerd/errdefs"
)

const (
	// outputLimit is how many bytes of both streams together ExecSync returns. The rest is dropped,
	// so that a talkative probe cannot fill memory (CRI ExecSync names 16 MB). The answer must fit
	// into the 16 MiB that a kubelet takes: beside the output it has two tags with a length of at
	// most 4 bytes and a code of at most 11 bytes.
	outputLimit = 16<<20 - 2*(1+4) - 11
	// outputBudget is how many bytes of output all calls of ExecSync together hold in memory.
	outputBudget = 48 << 20
	// freeOutput is what each stream may hold beside the budget, so that no call fails for the
	// output of others. The kubelet reads 10 KiB of a probe's.
	freeOutput = 16 << 10
	// outputChunk is the size in bytes of the pieces in which more is held.
	outputChunk = 64 << 10
)

// outputBytes counts the output that all calls hold. The zero value is ready.
type outputBytes struct{ held atomic.Int64 }

// take takes n bytes for a stream that holds as many as mine. A stream may hold as much as it
// leaves to the others, so that endless output never takes everything.
func (b *outputBytes) take(n, mine int64) bool {
	for {
		held := b.held.Load()
		if free := outputBudget - held - n; free < mine+n {
			return false
		}
		if b.held.CompareAndSwap(held, held+n) {
			return true
		}
	}
}

// capped holds the first outputLimit bytes of what is written, and takes the rest without an error.
type capped struct {
	budget *outputBytes
	chunks [][]byte
	size   int   // of all chunks together
	taken  int64 // of the budget
	short  bool  // the budget did not suffice
}

// Write implements io.Writer.
func (c *capped) Write(p []byte) (int, error) {
	for rest := p[:min(len(p), outputLimit-c.size)]; len(rest) > 0 && !c.short; {
		if last := len(c.chunks) - 1; last < 0 || len(c.chunks[last]) == cap(c.chunks[last]) {
			c.grow(len(rest))
			continue
		}

		last := &c.chunks[len(c.chunks)-1]
		n := min(len(rest), cap(*last)-len(*last))
		*last = append(*last, rest[:n]...)
		rest, c.size = rest[n:], c.size+n
	}

	return len(p), nil
}

// grow adds a chunk for at least one byte.
func (c *capped) grow(want int) {
	size := outputChunk
	if c.size < freeOutput {
		size = min(max(want, 512), freeOutput-c.size)
	} else if c.budget.take(outputChunk, c.taken) {
		c.taken += outputChunk
	} else {
		c.short = true
		return
	}

	c.chunks = append(c.chunks, make([]byte, 0, size))
}

// bytes returns what was written as one piece.
func (c *capped) bytes() []byte {
	if len(c.chunks) == 1 {
		return c.chunks[0]
	}

	all := make([]byte, 0, c.size)
	for i, chunk := range c.chunks {
		all = append(all, chunk...)
		c.chunks[i] = nil // may be collected
	}

	return all
}

// err reports that output was lost.
func (c *capped) err() error {
	if !c.short {
		return nil
	}
	return fmt.Errorf("all calls of ExecSync together hold too much output (%d MiB); run fewer commands at once, or "+
		"commands that print less: %w",
		outputBudget>>20, errdefs.ErrResourceExhausted)
}

// release gives back what was taken of the budget.
func (c *capped) release() { c.budget.held.Add(-c.taken) }
