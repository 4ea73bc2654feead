package node

import (
	"context"
	"sync"
	"time"

	"cri-dockerd/internal/model"
)

// dirtySet is what events have named and nobody has read yet, with the time from which it is to be read. Marking never blocks.
type dirtySet struct {
	wake chan struct{} // one element when something may have to be done
	mu   sync.Mutex    // guards due
	due  map[model.ContainerID]time.Time
}

func newDirtySet() *dirtySet {
	return &dirtySet{wake: make(chan struct{}, 1), due: map[model.ContainerID]time.Time{}}
}

// mark names an object, to be read after a while, or earlier if it has been marked so.
func (d *dirtySet) mark(id model.ContainerID, after time.Duration) {
	due := time.Now().Add(after)
	d.mu.Lock()
	if earlier, ok := d.due[id]; !ok || due.Before(earlier) {
		d.due[id] = due
	}
	d.mu.Unlock()
	d.signal()
}

func (d *dirtySet) signal() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

func (d *dirtySet) forget(id model.ContainerID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.due, id)
}

// next waits for something that is to be read, and takes it. It fails with ctx's error.
func (d *dirtySet) next(ctx context.Context) (id model.ContainerID, err error) {
	for {
		id, wait, ok := d.take()
		if ok {
			return id, nil
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return "", ctx.Err()
		case <-d.wake:
			t.Stop()
		case <-t.C:
		}
	}
}

// take takes what has been due for longest, or says how long nothing will be. While more is left, others are woken.
func (d *dirtySet) take() (first model.ContainerID, wait time.Duration, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	wait = time.Hour // for ever: a mark wakes
	for id, due := range d.due {
		if w := time.Until(due); w < wait {
			first, wait, ok = id, w, true
		}
	}
	if !ok || wait > 0 {
		return "", wait, false
	}
	delete(d.due, first)
	if len(d.due) > 0 {
		d.signal()
	}
	return first, 0, true
}
