package cri

import (
	"sync"
	"time"
)

// debtPatience is how long a network that cannot be released holds up the end of its pod. Until then every call fails with the plugin's own
// words, which the kubelet shows as an event of the pod and tries again; afterwards the pod goes, its network is still owed, and recovery
// tries on until it is released.
const debtPatience = time.Minute

// debts are the networks that could not be released yet.
type debts struct {
	mu    sync.Mutex
	since map[string]time.Time // of the first failure, by sandbox ID
	wake  chan struct{}        // holds one element when recovery has something new to do
}

func newDebts() *debts { return &debts{since: map[string]time.Time{}, wake: make(chan struct{}, 1)} }

// failed notes a failure and says whether the pod has waited long enough.
func (d *debts) failed(id string, now time.Time) (enough bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	first, known := d.since[id]
	if !known {
		d.since[id] = now
		return false
	}
	if enough = now.Sub(first) >= debtPatience; enough {
		d.signal()
	}
	return enough
}

// signal requests a recovery. It never blocks.
func (d *debts) signal() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// owe notes that a pod does not wait for its network any longer.
func (d *debts) owe(id string, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.since[id] = now.Add(-debtPatience)
}

func (d *debts) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.since)
}

func (d *debts) paid(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.since, id)
}
