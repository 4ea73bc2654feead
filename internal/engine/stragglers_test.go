package engine

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestStragglers checks that a request is cancelled only if the engine hangs on it, not if the
// engine is busy or unavailable, or if a response has started.
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
		ping      func(context.Context) error
		others    bool // other requests of the batch get responses
		responded bool // the response has started
		cancelled bool
	}{
		"hanging request":      {ping: pingIn(time.Millisecond, nil), cancelled: true},
		"busy engine":          {ping: pingIn(time.Second, nil)},
		"unavailable engine":   {ping: pingIn(time.Millisecond, errors.New("unavailable"))},
		"hanging engine":       {ping: pingIn(time.Hour, nil)},
		"others get responses": {ping: pingIn(time.Millisecond, nil), others: true},
		"response has started": {ping: pingIn(time.Millisecond, nil), responded: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStragglers(t.Context(), test.ping)
				defer s.stop()

				ctx, done := s.begin(t.Context())
				defer done()

				if test.responded {
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
				if cancelled := ctx.Err() != nil; cancelled != test.cancelled {
					t.Errorf("cancelled: %v, want %v", cancelled, test.cancelled)
				}
			})
		})
	}
}
