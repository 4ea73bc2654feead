package view

import (
	"time"

	"cri-dockerd/internal/engine"
)

// settleTime is how long events gather before their container is read. A call of our own that
// caused them reads it itself meanwhile.
const settleTime = 5 * time.Millisecond

// observe applies an event and schedules an inspection where the event does not say everything.
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
		v.pendingImages.add(allImages, settleTime)
		return
	}

	v.mu.Lock()
	defer v.mu.Unlock()

	if e.Kind == engine.Destroyed {
		v.publishLocked(v.store.remove(e.ID, e.At))
		v.pending.remove(e.ID)
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
	case engine.Died:
		v.pending.add(e.ID, 0) // no call of ours reads it
	default:
		v.pending.add(e.ID, settleTime)
	}
}
