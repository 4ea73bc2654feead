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
	// execInspectTimeout bounds one inspect of a cancelled exec. The engine responds from memory.
	execInspectTimeout = 10 * time.Second
	// reapInterval is the maximum interval of these inspects per exec. It grows by the same amount
	// for each further reapBatch execs, so that the engine gets at most 64 inspects per second.
	reapInterval = 2 * time.Second
	reapBatch    = 128
	// maxReaps bounds the number of pending cancelled execs. A probe every second of a container on
	// which the engine hangs adds 600 of them before the first one times out.
	maxReaps = 4096
)

var errTooManyReaps = fmt.Errorf("limit of %d pending cancelled execs reached", maxReaps)

// reaps runs goroutines to end the commands of cancelled execs. The zero value is ready to use.
type reaps struct {
	mu      sync.Mutex // guards the fields below
	closed  chan struct{}
	running sync.WaitGroup
	count   int
}

// interval returns the maximum interval of inspects for one command.
func (r *reaps) interval() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return reapInterval * time.Duration(1+r.count/reapBatch)
}

func (r *reaps) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count--
}

// start runs do in a goroutine. Its context is not cancelled with ctx, but by the timeout or by
// close.
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

// close cancels all goroutines and waits for them.
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

// abort ends the command of a call that fails with err, and returns err. The engine may start the
// command much later, so abort waits only briefly and continues in the background.
func (r *execution) abort(ctx context.Context, err error) error {
	end := r.endFunc(ctx, err)
	if end == nil {
		return err
	}

	done := make(chan error, 1)
	report := func(err error) {
		if err != nil {
			r.cfg.Log.Warn("command of a cancelled exec may still be running", "container", r.container,
				"exec", r.id, "err", err)
		}
		done <- err
	}

	startErr := r.reaps.start(ctx, r.execs.reap, func(ctx context.Context) { report(r.reap(ctx, end)) })
	if startErr != nil {
		report(startErr)
	}

	late := time.NewTimer(r.execs.reply)
	defer late.Stop()

	select {
	case failed := <-done:
		if failed != nil {
			return fmt.Errorf("%w (the command may still be running: %w)", err, failed)
		}
	case <-late.C:
	}

	return err
}

// endFunc returns the function to end the command of a failed call, or nil to let it continue.
func (r *execution) endFunc(ctx context.Context, err error) func(proc string, pid int, container string) error {
	cancelled := ctx.Err() != nil || errdefs.IsUnavailable(err)
	switch {
	case cancelled && !errors.Is(err, ErrClientDisconnected):
		return killTree
	case r.TTY:
		return hangUp // the client has disconnected or does not read
	default:
		return nil
	}
}

// reap ends the command as soon as the engine has started it. It returns nil if the command has
// exited or the container was removed.
func (r *execution) reap(ctx context.Context, end func(proc string, pid int, container string) error) error {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, r.reaps.interval()) {
		inspectCtx, cancel := context.WithTimeout(ctx, execInspectTimeout)
		state, err := r.execState(inspectCtx, r.id)
		cancel()
		switch {
		case errdefs.IsNotFound(err):
			return nil
		case err != nil: // retry
		case state.exited && (state.pid != 0 || state.isFailed):
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
