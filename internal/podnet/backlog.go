package podnet

import (
	"sync"
	"time"

	"cri-dockerd/internal/model"
)

// maxRemovalDelay limits how long a failing release delays the removal of its pod. Until then every
// call returns the plugin's own error. The kubelet reports it as an event of the pod and retries.
// Afterwards the pod is removed, and recovery retries the release until it succeeds.
const maxRemovalDelay = time.Minute

// backlog holds the pods with an unreleased network.
type backlog struct {
	mu    sync.Mutex                      // guards since
	since map[model.ContainerID]time.Time // of the first failure
	wake  chan struct{}                   // holds one element if recovery has new work
}

func newBacklog() *backlog {
	return &backlog{since: map[model.ContainerID]time.Time{}, wake: make(chan struct{}, 1)}
}

// recordFailure records a failed release and reports whether maxRemovalDelay is over.
func (b *backlog) recordFailure(id model.ContainerID, now time.Time) (isOver bool) {
	b.mu.Lock()
	defer b.mu.Unlock()

	first, known := b.since[id]
	if !known {
		b.since[id] = now
		return false
	}

	if isOver = now.Sub(first) >= maxRemovalDelay; isOver {
		b.signal()
	}

	return isOver
}

// signal requests a recovery. It never blocks.
func (b *backlog) signal() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// expire ends the delay of a pod's removal.
func (b *backlog) expire(id model.ContainerID, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.since[id] = now.Add(-maxRemovalDelay)
}

func (b *backlog) count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.since)
}

func (b *backlog) remove(id model.ContainerID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.since, id)
}
