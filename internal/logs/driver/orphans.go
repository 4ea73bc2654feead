package driver

import (
	"sync"
	"time"

	"cri-dockerd/internal/model"
)

// orphans tracks the containers of engines that died. Their entries stay in the table for the
// engine's successor. The successor must continue in the same file: the kubelet may have renamed
// it, and may rename it back over any file at the log's path. It is safe for concurrent use.
type orphans struct {
	table   *table
	timeout time.Duration // for a successor
	closed  <-chan struct{}

	mu      sync.Mutex                  // guards entries
	entries map[model.ContainerID]entry // each is in the table, with the time of its orphaning
}

func newOrphans(t *table, timeout time.Duration, closed <-chan struct{}) *orphans {
	return &orphans{
		table:   t,
		timeout: timeout,
		closed:  closed,
		entries: map[model.ContainerID]entry{},
	}
}

// add keeps an entry until forget is called or the timeout expires.
func (o *orphans) add(e entry) (err error) {
	if e.Orphaned.IsZero() {
		e.Orphaned = time.Now()
		err = o.table.save(&e)
	}

	o.mu.Lock()
	other := o.entries[e.Container]
	o.entries[e.Container] = e
	o.mu.Unlock()
	if other.FIFO != "" && other.FIFO != e.FIFO {
		o.table.forget(&other)
	}

	// A container removed meanwhile has no successor.
	time.AfterFunc(o.timeout-time.Since(e.Orphaned), o.removeExpired)

	return err
}

// find returns the entry of a container, or an empty one.
func (o *orphans) find(container model.ContainerID) entry {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.entries[container]
}

// forget removes the entry of a container, and all expired ones.
func (o *orphans) forget(container model.ContainerID) {
	o.mu.Lock()
	var old []entry
	for c, e := range o.entries {
		if c == container || time.Since(e.Orphaned) >= o.timeout {
			old = append(old, e)
			delete(o.entries, c)
		}
	}

	o.mu.Unlock()
	for _, e := range old {
		o.table.forget(&e)
	}
}

// removeExpired removes the expired entries. After Close the table belongs to the next process.
func (o *orphans) removeExpired() {
	if !isClosed(o.closed) {
		o.forget("")
	}
}
