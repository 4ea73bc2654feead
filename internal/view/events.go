package view

import (
	"time"

	"cri-dockerd/internal/engine"
)

// settleTime is the delay before the container of an event is read, to collect further events. If
// one of our own calls caused them, it reads the container itself meanwhile.
const settleTime = 5 * time.Millisecond

// observe applies an event, and schedules an inspection for details missing from the event.
func (v *View) observe(e engine.Event) {
	v.metrics.countEvent(e)
	v.arrived.add(e)
	if e.Missed {
		select {
		case v.missed <- struct{}{}:
		default: // requested already
		}
		return
	}

	if e.Image {
		if e.ImageRef != "" {
			v.pendingRefs.add(e.ImageRef, settleTime)
		}
		v.pendingImages.add(allImages, settleTime)
		return
	}

	if e.Kind == engine.Died {
		v.settleOOM(e.ID, e.ExitCode, e.At)
	}

	v.mu.Lock()
	defer v.mu.Unlock()

	if e.Kind == engine.Destroyed {
		v.publishLocked(v.store.remove(e.ID, e.At))
		v.pending.remove(e.ID)
		v.updated.remove(e.ID)
		delete(v.retries, e.ID)
		v.metrics.beginRead(e.ID)()
		return
	}

	e = v.restoreEventLocked(e)
	v.observeOOMLocked(e)
	if transitions := v.store.apply(e); len(transitions) > 0 {
		v.publishLocked(transitions)
		v.metrics.beginRead(e.ID)()
	}

	switch e.Kind {
	case engine.Killed: // Died follows
	case engine.Updated:
		v.updated.add(e.ID, settleTime)
		v.pending.add(e.ID, settleTime)
	case engine.Died:
		v.pending.add(e.ID, 0) // no call reads it
	default:
		v.pending.add(e.ID, settleTime)
	}
}
