package engine

import (
	"context"
	"io"
	"sync"
	"time"
)

// pace watches for writers that block; one writes at a time. The engine closes the streams of a
// command 2 s after its end, so a command may end unnoticed while a writer blocks, and the rest of
// its output is lost.
type pace struct {
	run  *execution
	ctx  context.Context
	poll *time.Timer

	mu      sync.Mutex // guards the rest
	writing bool
	alive   time.Time // when the command was last known to run, or nothing was blocked
	ended   bool      // Ended was called
	lossy   bool
}

func newPace(ctx context.Context, r *execution) *pace {
	p := &pace{run: r, ctx: ctx}
	p.poll = time.AfterFunc(time.Hour, p.check)
	p.poll.Stop()
	return p
}

// streams are those of the exec, with writers that report when they block.
func (p *pace) streams() Streams {
	s := p.run.Streams
	if s.Stdout != nil {
		s.Stdout = paced{s.Stdout, p}
	}
	if s.Stderr != nil {
		s.Stderr = paced{s.Stderr, p}
	}

	return s
}

type paced struct {
	io.Writer
	pace *pace
}

// Write implements io.Writer.
func (w paced) Write(b []byte) (int, error) {
	w.pace.begin()
	n, err := w.Writer.Write(b)
	if err == nil {
		w.pace.end()
	}
	return n, err
}

func (p *pace) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.writing, p.alive = true, time.Now()
	p.poll.Reset(p.run.execs.poll)
}

// end notes that a writer goes on. If nothing is known of the command for too long, it is
// inspected.
func (p *pace) end() {
	p.mu.Lock()
	p.writing = false
	p.poll.Stop()
	late := time.Since(p.alive) > p.run.execs.drop && !p.ended
	p.mu.Unlock()
	if !late {
		return
	}

	ctx, cancel := context.WithTimeout(p.ctx, p.run.execs.drop)
	defer cancel()

	state, err := p.run.execState(ctx, p.run.id)
	p.mu.Lock()
	defer p.mu.Unlock()

	p.lossy = p.lossy || err != nil || state.ended
}

// check inspects the command while a writer blocks.
func (p *pace) check() {
	ctx, cancel := context.WithTimeout(p.ctx, p.run.execs.drop)
	defer cancel()

	now := time.Now()
	state, err := p.run.execState(ctx, p.run.id)

	p.mu.Lock()
	defer p.mu.Unlock()

	switch {
	case p.ctx.Err() != nil || p.ended || !p.writing:
	case err == nil && state.ended:
		p.ended = true
		p.lossy = p.lossy || time.Since(p.alive) > p.run.execs.drop
		if p.run.Ended != nil {
			p.run.Ended()
		}

	default:
		if err == nil {
			p.alive = now
		}
		p.poll.Reset(p.run.execs.poll)
	}
}

// isLossy reports whether the engine may have dropped output.
func (p *pace) isLossy() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.writing = false
	p.poll.Stop()
	return p.lossy
}
