package view

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"cri-dockerd/internal/engine"
)

// A silent event stream cannot be distinguished from an idle engine. So the view compares the
// events that the engine remembers with the received ones. A list of all containers would cost the
// engine too much.
const (
	// CheckInterval is the time between two checks.
	CheckInterval = 10 * time.Second
	checkTimeout  = 5 * time.Second
	// arrivalTime is the delay after which an event counts as missed.
	arrivalTime = 2 * time.Second
	// maxUnchecked bounds the period whose events are kept while the checks fail.
	maxUnchecked = time.Minute
)

var errEventsMissed = errors.New("events are missing from the engine's event stream")

// arrivals holds the recent events for the next check. The zero value is ready to use.
type arrivals struct {
	mu     sync.Mutex // guards events
	events map[engine.Event]struct{}
}

// add records a received event.
func (a *arrivals) add(e engine.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.events == nil {
		a.events = map[engine.Event]struct{}{}
	}
	a.events[e] = struct{}{}
}

// missing returns the events not received yet.
func (a *arrivals) missing(events []engine.Event) []engine.Event {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.DeleteFunc(events, func(e engine.Event) bool {
		_, ok := a.events[e]
		return ok || e.Missed // it cannot be compared, and its arrival causes a full read
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

// checkEvents fails with errEventsMissed if the engine remembers an event that the view has not
// received. A failed check proves nothing: the heartbeat detects hanging engines.
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
			v.log.Debug("cannot read the engine's recent events", "err", err)
			if oldest := until.Add(-maxUnchecked); since.Before(oldest) {
				since = oldest
			}
			v.arrived.forget(since)
			continue
		}

		if len(missing) > 0 {
			v.log.Warn("missed events of the engine; reconnecting", "events", len(missing), "first", missing[0].At)
			return errEventsMissed
		}

		v.arrived.forget(since)
		since = until
	}
}

// missedBetween returns the events of a period that were not received within arrivalTime.
func (v *View) missedBetween(ctx context.Context, since, until time.Time) ([]engine.Event, error) {
	readCtx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()

	remembered, err := v.src.EventsBetween(readCtx, since, until)
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
