package engine

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// stragglerTimeout is how long a batch of requests waits while the engine answers none of them.
const stragglerTimeout = 2 * time.Second

// stragglers cancels the requests of a batch on which the engine hangs: they are unanswered, no
// other request of the batch has been answered for a while, and the engine answers a ping at once.
// A busy engine is slow with pings too. It is safe for concurrent use.
type stragglers struct {
	ping  func(context.Context) error
	timer *time.Timer
	ctx   context.Context // ends with the batch
	end   context.CancelFunc

	mu       sync.Mutex // guards the rest
	begun    int
	answered int
	seen     int // answered when expire looked last
	cancels  map[int]context.CancelCauseFunc
}

func newStragglers(ctx context.Context, ping func(context.Context) error) *stragglers {
	s := &stragglers{ping: ping, cancels: map[int]context.CancelCauseFunc{}}
	s.ctx, s.end = context.WithCancel(ctx)
	s.mu.Lock() // expire waits for the timer
	defer s.mu.Unlock()
	s.timer = time.AfterFunc(stragglerTimeout, s.expire)
	return s
}

// begin returns the context for a request of the batch. done must be called when it has ended.
func (s *stragglers) begin(ctx context.Context) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()

	s.begun++
	number := s.begun
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

// arrivedKey is the key of the function of a request's context that ask calls when its answer
// begins.
type arrivedKey struct{}

// expire cancels what is unanswered unless the engine is busy or away, and looks again after a
// while.
func (s *stragglers) expire() {
	ctx, cancel := context.WithTimeout(s.ctx, stragglerTimeout)
	defer cancel()

	began := time.Now()
	err := s.ping(ctx)
	quick := err == nil && time.Since(began) < stragglerTimeout/10

	s.mu.Lock()
	defer s.mu.Unlock()

	if quick && s.answered == s.seen {
		for _, cancel := range s.cancels {
			cancel(fmt.Errorf("the engine has not answered within %s, although it answers others: %w", stragglerTimeout,
				context.DeadlineExceeded))
		}
	}

	s.seen = s.answered
	if s.ctx.Err() == nil {
		s.timer.Reset(stragglerTimeout)
	}
}

// stop ends the watch over the batch.
func (s *stragglers) stop() {
	s.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer.Stop()
}
