package node

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"cri-dockerd/internal/engine"
)

// An event stream that has gone silent looks like a quiet engine. So the engine's own memory of its
// last events is compared with what has arrived, now and then; a list of all containers would cost
// the engine too much.
const (
	// CheckInterval is between two checks.
	CheckInterval = 10 * time.Second
	checkTimeout  = 5 * time.Second
	// arrivalTime is how long an event may be under way before it counts as missed.
	arrivalTime = 2 * time.Second
	// maxUnchecked bounds the events that are kept for an engine that does not answer the checks.
	maxUnchecked = time.Minute
)

var errEventsMissed = errors.New("the engine's event stream has left out events")

// arrivals are the events of the last time, as far as a check may ask for them. The zero value is
// ready.
type arrivals struct {
	mu     sync.Mutex // guards events
	events map[engine.Event]struct{}
}

// add notes an event that has arrived.
func (a *arrivals) add(e engine.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.events == nil {
		a.events = map[engine.Event]struct{}{}
	}
	a.events[e] = struct{}{}
}

// missing returns the events that have not arrived.
func (a *arrivals) missing(events []engine.Event) []engine.Event {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.DeleteFunc(events, func(e engine.Event) bool {
		_, ok := a.events[e]
		return ok || e.Missed // it cannot be compared, and its arrival has everything read anew
	})
}

// forget drops the events before a time.
func (a *arrivals) forget(before time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for e := range a.events {
		if e.At.Before(before) {
			delete(a.events, e)
		}
	}
}

// checkEvents fails with errEventsMissed when the engine remembers an event that has not arrived. A
// check that gives no answer proves nothing: the heartbeat is for engines that hang.
func (v *View) checkEvents(ctx context.Context) error {
	tick := time.NewTicker(CheckInterval)
	defer tick.Stop()
	for since := time.Now(); ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}

		until := time.Now().Add(-time.Second)
		missing, err := v.missedBetween(ctx, since, until)
		if err != nil {
			v.log.Debug("the engine's last events cannot be read", "err", err)
			if oldest := until.Add(-maxUnchecked); since.Before(oldest) {
				since = oldest
			}
			v.arrived.forget(since)
			continue
		}
		if len(missing) > 0 {
			v.log.Warn("events of the engine have not arrived", "events", len(missing), "first", missing[0].At)
			return errEventsMissed
		}
		v.arrived.forget(since)
		since = until
	}
}

// missedBetween returns the events of a span of time that have not arrived, although they had time
// to do so.
func (v *View) missedBetween(ctx context.Context, since, until time.Time) ([]engine.Event, error) {
	askCtx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	remembered, err := v.src.EventsBetween(askCtx, since, until)
	if err != nil {
		return nil, err
	}
	missing := v.arrived.missing(remembered)
	if len(missing) == 0 {
		return nil, nil
	}

	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(arrivalTime):
	}
	return v.arrived.missing(missing), nil
}
