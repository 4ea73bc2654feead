package engine

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestStragglers: a request is given up only if the engine hangs on it, not if the engine is busy
// or away, or the answer has begun.
func TestStragglers(t *testing.T) {
	pingIn := func(d time.Duration, err error) func(context.Context) error {
		return func(ctx context.Context) error {
			select {
			case <-time.After(d):
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}

	for name, test := range map[string]struct {
		ping   func(context.Context) error
		others bool // other requests of the batch are answered
		begun  bool // the answer has begun
		given  bool // up
	}{
		"hangs":                  {ping: pingIn(time.Millisecond, nil), given: true},
		"a busy engine":          {ping: pingIn(time.Second, nil)},
		"an engine that is away": {ping: pingIn(time.Millisecond, errors.New("away"))},
		"an engine that stops":   {ping: pingIn(time.Hour, nil)},
		"others are answered":    {ping: pingIn(time.Millisecond, nil), others: true},
		"a long answer":          {ping: pingIn(time.Millisecond, nil), begun: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStragglers(t.Context(), test.ping)
				defer s.stop()

				ctx, done := s.begin(t.Context())
				defer done()

				if test.begun {
					ctx.Value(arrivedKey{}).(func())()
				}

				for range 10 {
					time.Sleep(stragglerTimeout * 9 / 10)
					if test.others {
						_, answered := s.begin(t.Context())
						answered()
					}
				}

				synctest.Wait()
				if given := ctx.Err() != nil; given != test.given {
					t.Errorf("given up: %v", given)
				}
			})
		})
	}
}
