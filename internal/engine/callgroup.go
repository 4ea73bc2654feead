package engine

import (
	"context"
	"sync"
)

// callGroup shares one call among concurrent callers with the same key. The zero value is ready to
// use.
type callGroup[T any] struct {
	mu    sync.Mutex // guards calls, and waiters of each
	calls map[string]*sharedCall[T]
}

type sharedCall[T any] struct {
	waiters int
	cancel  context.CancelFunc
	done    chan struct{} // closed after result and err are set
	result  T
	err     error
}

// do returns the result of call, which runs once for all concurrent callers with the same key. When
// ctx ends, do returns its error. call is cancelled when no caller waits any more.
func (g *callGroup[T]) do(ctx context.Context, key string, call func(context.Context) (T, error)) (T, error) {
	g.mu.Lock()
	c := g.calls[key]
	if c == nil {
		callCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		c = &sharedCall[T]{cancel: cancel, done: make(chan struct{})}
		if g.calls == nil {
			g.calls = map[string]*sharedCall[T]{}
		}

		g.calls[key] = c
		go func() {
			defer cancel()
			c.result, c.err = call(callCtx)
			g.remove(key, c)
			close(c.done)
		}()
	}

	c.waiters++
	g.mu.Unlock()

	select {
	case <-c.done:
		return c.result, c.err
	case <-ctx.Done():
	}

	g.mu.Lock()
	defer g.mu.Unlock()

	if c.waiters--; c.waiters == 0 {
		g.removeLocked(key, c) // later callers start a new call
		c.cancel()
	}

	var none T

	return none, ctx.Err()
}

func (g *callGroup[T]) remove(key string, c *sharedCall[T]) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removeLocked(key, c)
}

func (g *callGroup[T]) removeLocked(key string, c *sharedCall[T]) {
	if g.calls[key] == c {
		delete(g.calls, key)
	}
}
