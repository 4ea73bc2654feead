package engine

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// stragglerTimeout bounds the time without any response to a batch of requests.
const stragglerTimeout = 2 * time.Second

// stragglers cancels the hanging requests of a batch. The engine hangs on the pending requests if
// none of them got a response within stragglerTimeout, but a ping gets an immediate response. A
// busy engine is slow with pings too. stragglers is safe for concurrent use.
type stragglers struct {
	ping  func(context.Context) error
	timer *time.Timer
	ctx   context.Context // ends with the batch
	end   context.CancelFunc

	mu           sync.Mutex // guards the fields below
	started      int
	answered     int
	lastAnswered int // value of answered at the last call of expire
	cancels      map[int]context.CancelCauseFunc
}

func newStragglers(ctx context.Context, ping func(context.Context) error) *stragglers {
	s := &stragglers{ping: ping, cancels: map[int]context.CancelCauseFunc{}}
	s.ctx, s.end = context.WithCancel(ctx)
	s.mu.Lock() // expire must not run before s.timer is set
	defer s.mu.Unlock()
	s.timer = time.AfterFunc(stragglerTimeout, s.expire)
	return s
}

// begin returns the context for a request of the batch. The caller must call done after the
// request.
func (s *stragglers) begin(ctx context.Context) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()

	s.started++
	number := s.started
	s.cancels[number] = cancel
	arrived := sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.cancels, number)
		s.answered++
	})

	return context.WithValue(ctx, arrivedKey{}, arrived), func() {
		arrived()
		cancel(nil)
	}
}

// arrivedKey is the context key of a function. readResponse calls it when a response has arrived.
type arrivedKey struct{}

// expire cancels the pending requests unless the engine is busy or unavailable, and restarts the
// timer.
func (s *stragglers) expire() {
	ctx, cancel := context.WithTimeout(s.ctx, stragglerTimeout)
	defer cancel()

	started := time.Now()
	err := s.ping(ctx)
	isIdle := err == nil && time.Since(started) < stragglerTimeout/10

	s.mu.Lock()
	defer s.mu.Unlock()

	if isIdle && s.answered == s.lastAnswered {
		for _, cancel := range s.cancels {
			cancel(fmt.Errorf("engine did not respond within %s, but responds to other requests: %w",
				stragglerTimeout, context.DeadlineExceeded))
		}
	}

	s.lastAnswered = s.answered
	if s.ctx.Err() == nil {
		s.timer.Reset(stragglerTimeout)
	}
}

// stop stops the timer.
func (s *stragglers) stop() {
	s.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer.Stop()
}
