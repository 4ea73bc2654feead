package engine

import (
	"context"
	"sync"
)

// shared lets callers that ask for the same thing at the same time share one call. The zero value
// is ready.
type shared struct {
	mu    sync.Mutex // guards calls, and waiting of each
	calls map[string]*sharedCall
}

type sharedCall struct {
	waiting int
	cancel  context.CancelFunc
	done    chan struct{} // closed when result and err are there
	result  string
	err     error
}

// do returns what call returns, which runs once for all who ask for the same key meanwhile. It
// returns ctx's error when that ends; call is cancelled when nobody waits any more.
func (s *shared) do(ctx context.Context, key string, call func(context.Context) (string, error)) (string, error) {
	s.mu.Lock()
	c := s.calls[key]
	if c == nil {
		callCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		c = &sharedCall{cancel: cancel, done: make(chan struct{})}
		if s.calls == nil {
			s.calls = map[string]*sharedCall{}
		}

		s.calls[key] = c
		go func() {
			defer cancel()
			c.result, c.err = call(callCtx)
			s.forget(key, c)
			close(c.done)
		}()
	}

	c.waiting++
	s.mu.Unlock()
	select {
	case <-c.done:
		return c.result, c.err
	case <-ctx.Done():
	}

	s.mu.Lock()
	if c.waiting--; c.waiting == 0 { // whoever comes now begins anew
		if s.calls[key] == c {
			delete(s.calls, key)
		}
		c.cancel()
	}

	s.mu.Unlock()

	return "", ctx.Err()
}

func (s *shared) forget(key string, c *sharedCall) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.calls[key] == c {
		delete(s.calls, key)
	}
}
