package cri

import (
	"fmt"
	"sync/atomic"

	"github.com/containerd/errdefs"
)

const (
	// outputLimit is the largest output of ExecSync in bytes, of both streams together. ExecSync
	// drops any further output to bound its memory (CRI ExecSync names 16 MB). The response must
	// fit into the kubelet's limit of 16 MiB: beside the output it contains two tags with a length
	// of at most 4 bytes and an exit code of at most 11 bytes.
	outputLimit = 16<<20 - 2*(1+4) - 11
	// outputBudget is the memory for the output of all ExecSync calls together, in bytes.
	outputBudget = 48 << 20
	// freeOutput is each stream's allowance outside the budget, so that no call fails because of
	// the output of others. The kubelet reads 10 KiB from a probe.
	freeOutput = 16 << 10
	// outputChunk is the size of further buffers, in bytes.
	outputChunk = 64 << 10
)

// outputBytes counts the buffered output of all calls. The zero value is ready to use.
type outputBytes struct{ held atomic.Int64 }

// reserve reserves n bytes for a stream that already holds mine bytes. A stream may hold at most as
// much as remains for the others, so endless output never exhausts the budget.
func (b *outputBytes) reserve(n, mine int64) bool {
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

// limitedBuffer keeps the first outputLimit bytes written, and discards the others without an
// error.
type limitedBuffer struct {
	budget   *outputBytes
	chunks   [][]byte
	size     int   // of all chunks
	reserved int64 // reserved from the budget
	short    bool  // the budget is exhausted
}

// Write implements io.Writer.
func (c *limitedBuffer) Write(p []byte) (int, error) {
	for remaining := p[:min(len(p), outputLimit-c.size)]; len(remaining) > 0 && !c.short; {
		if last := len(c.chunks) - 1; last < 0 || len(c.chunks[last]) == cap(c.chunks[last]) {
			c.grow(len(remaining))
			continue
		}

		last := &c.chunks[len(c.chunks)-1]
		n := min(len(remaining), cap(*last)-len(*last))
		*last = append(*last, remaining[:n]...)
		remaining, c.size = remaining[n:], c.size+n
	}

	return len(p), nil
}

// grow adds a chunk for at least one byte.
func (c *limitedBuffer) grow(want int) {
	size := outputChunk
	if c.size < freeOutput {
		size = min(max(want, 512), freeOutput-c.size)
	} else if c.budget.reserve(outputChunk, c.reserved) {
		c.reserved += outputChunk
	} else {
		c.short = true
		return
	}

	c.chunks = append(c.chunks, make([]byte, 0, size))
}

// bytes returns all kept output in one slice.
func (c *limitedBuffer) bytes() []byte {
	if len(c.chunks) == 1 {
		return c.chunks[0]
	}

	all := make([]byte, 0, c.size)
	for i, chunk := range c.chunks {
		all = append(all, chunk...)
		c.chunks[i] = nil // release it early
	}

	return all
}

// err returns an error if output was lost.
func (c *limitedBuffer) err() error {
	if !c.short {
		return nil
	}
	return fmt.Errorf("output of all ExecSync calls exceeds %d MiB; run fewer commands at once, or "+
		"commands with less output: %w",
		outputBudget>>20, errdefs.ErrResourceExhausted)
}

// release returns the reserved bytes to the budget.
func (c *limitedBuffer) release() { c.budget.held.Add(-c.reserved) }
