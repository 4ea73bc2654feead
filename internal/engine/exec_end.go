package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// execInspectTimeout bounds one inspect of an exec that was given up. The engine answers from
	// memory.
	execInspectTimeout = 10 * time.Second
	// reapInterval is the longest pause between two of them, for each reapCrowd commands that were
	// given up: the engine gets at most 64 a second, however many there are.
	reapInterval = 2 * time.Second
	reapCrowd    = 128
	// maxReaps bounds the commands that are waited for. A probe each second of a container on which
	// the engine hangs gives 600 up before the first is forgotten.
	maxReaps = 4096
)

var errTooManyReaps = fmt.Errorf("%d commands whose calls were given up are waited for already", maxReaps)

// reaps are the goroutines that end commands whose calls were given up. The zero value is ready.
type reaps struct {
	mu      sync.Mutex // guards the rest
	closed  chan struct{}
	running sync.WaitGroup
	count   int
}

// interval is the longest pause between two inspects of one command.
func (r *reaps) interval() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return reapInterval * time.Duration(1+r.count/reapCrowd)
}

func (r *reaps) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count--
}

// start runs do with a context that outlives ctx, until its timeout or close.
func (r *reaps) start(ctx context.Context, timeout time.Duration, do func(context.Context)) error {
	r.mu.Lock()
	defer r.mu.Unlock()

	if r.count >= maxReaps {
		return errTooManyReaps
	}

	r.count++
	if r.closed == nil {
		r.closed = make(chan struct{})
	}

	closed := r.closed
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	r.running.Go(func() {
		defer r.end()
		defer cancel()

		done := make(chan struct{})
		defer close(done)

		go func() {
			select {
			case <-closed:
				cancel()
			case <-done:
			}
		}()

		do(ctx)
	})

	return nil
}

// close ends them.
func (r *reaps) close() {
	r.mu.Lock()
	if r.closed == nil {
		r.closed = make(chan struct{})
	}

	select {
	case <-r.closed:
	default:
		close(r.closed)
	}

	r.mu.Unlock()
	r.running.Wait()
}

// giveUp ends the command of a call that fails with err, and returns that error. The engine may
// start the command much later, so this goes on by itself when it takes long.
func (r *execution) giveUp(ctx context.Context, err error) error {
	end := r.endingOf(ctx, err)
	if end == nil {
		return err
	}

	done := make(chan error, 1)
	report := func(err error) {
		if err != nil {
			r.cfg.Log.Warn("a command whose call was given up may still run", "container", r.container, "exec", r.id,
				"err", err)
		}
		done <- err
	}
	if full := r.reaps.start(ctx, r.execs.reap, func(ctx context.Context) { report(r.reap(ctx, end)) }); full != nil {
		report(full)
	}

	late := time.NewTimer(r.execs.reply)
	defer late.Stop()

	select {
	case failed := <-done:
		if failed != nil {
			return fmt.Errorf("%w (and it may still run: %w)", err, failed)
		}
	case <-late.C:
	}

	return err
}

// endingOf returns how the command of a failed call is ended, nil for not at all.
func (r *execution) endingOf(ctx context.Context, err error) func(proc string, pid int, container string) error {
	given := ctx.Err() != nil || errdefs.IsUnavailable(err)
	switch {
	case given && !errors.Is(err, ErrClientGone):
		return killTree
	case r.TTY:
		return hangUp // the client is gone, or takes nothing more
	default:
		return nil
	}
}

// reap ends the command as soon as the engine has started it. A command that has ended, or whose
// container is gone, is no error.
func (r *execution) reap(ctx context.Context, end func(proc string, pid int, container string) error) error {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, r.reaps.interval()) {
		inspectCtx, cancel := context.WithTimeout(ctx, execInspectTimeout)
		state, err := r.execState(inspectCtx, r.id)
		cancel()
		switch {
		case errdefs.IsNotFound(err):
			return nil
		case err != nil: // again
		case state.ended && (state.pid != 0 || state.isFailed):
			return nil
		case state.pid != 0:
			return end("/proc", state.pid, string(r.container))
		}

		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}
