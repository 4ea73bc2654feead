package podnet

import (
	"sync"
	"time"

	"cri-dockerd/internal/model"
)

// owedAfter is how long a network that cannot be released holds up the removal of its pod. Until
// then every call fails with the plugin's own error, which the kubelet shows as an event of the pod
// and tries again. Afterwards the pod is removed, its network is still owed, and recovery tries on
// until it is released.
const owedAfter = time.Minute

// debts are the networks that could not be released yet.
type debts struct {
	mu    sync.Mutex                      // guards since
	since map[model.ContainerID]time.Time // of the first failure
	wake  chan struct{}                   // holds one element when recovery has something new to do
}

func newDebts() *debts {
	return &debts{since: map[model.ContainerID]time.Time{}, wake: make(chan struct{}, 1)}
}

// fail notes a failed release and reports whether the pod has waited long enough.
func (d *debts) fail(id model.ContainerID, now time.Time) (isOver bool) {
	d.mu.Lock()
	defer d.mu.Unlock()

	first, known := d.since[id]
	if !known {
		d.since[id] = now
		return false
	}

	if isOver = now.Sub(first) >= owedAfter; isOver {
		d.signal()
	}

	return isOver
}

// signal requests a recovery. It never blocks.
func (d *debts) signal() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// owe ends the wait of a pod for its network.
func (d *debts) owe(id model.ContainerID, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.since[id] = now.Add(-owedAfter)
}

func (d *debts) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.since)
}

func (d *debts) pay(id model.ContainerID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.since, id)
}
