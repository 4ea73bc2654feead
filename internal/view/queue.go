package view

import (
	"context"
	"sync"
	"time"
)

// queue holds objects to be read, each with its due time. It never holds an object twice, and
// adding never blocks.
type queue[K ~string] struct {
	wake chan struct{} // one element when something may be due
	mu   sync.Mutex    // guards due
	due  map[K]time.Time
}

func newQueue[K ~string]() *queue[K] {
	return &queue[K]{wake: make(chan struct{}, 1), due: map[K]time.Time{}}
}

// add makes an object due after a delay, or earlier if it was due earlier.
func (q *queue[K]) add(id K, delay time.Duration) {
	due := time.Now().Add(delay)
	q.mu.Lock()
	if earlier, ok := q.due[id]; !ok || due.Before(earlier) {
		q.due[id] = due
	}
	q.mu.Unlock()
	q.signal()
}

func (q *queue[K]) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *queue[K]) remove(id K) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.due, id)
}

// next waits until an object is due, and removes it from the queue. It fails with ctx's error.
func (q *queue[K]) next(ctx context.Context) (id K, err error) {
	for {
		id, wait, ok := q.take()
		if ok {
			return id, nil
		}

		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return "", ctx.Err()
		case <-q.wake:
			t.Stop()
		case <-t.C:
		}
	}
}

// take removes the object that has been due for longest, or returns the time until one is due.
// It wakes another reader while the queue is not empty.
func (q *queue[K]) take() (first K, wait time.Duration, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()

	wait = time.Hour // add wakes the reader
	for id, due := range q.due {
		if w := time.Until(due); w < wait {
			first, wait, ok = id, w, true
		}
	}

	if !ok || wait > 0 {
		return "", wait, false
	}

	delete(q.due, first)
	if len(q.due) > 0 {
		q.signal()
	}

	return first, 0, true
}
