package driver

import (
	"sync"
	"time"

	"cri-dockerd/internal/model"
)

// orphans are the containers whose engine has ended without a word. Their entries stay in the table
// for the engine's successor, which must go on in the same file: the kubelet may have renamed it,
// and be about to rename it back over whatever stands in its place. It is safe for concurrent use.
type orphans struct {
	table  *table
	away   time.Duration // how long to wait for a successor
	closed <-chan struct{}

	mu      sync.Mutex                  // guards entries
	entries map[model.ContainerID]entry // each is in the table, with the time since when
}

func newOrphans(t *table, away time.Duration, closed <-chan struct{}) *orphans {
	return &orphans{
		table:   t,
		away:    away,
		closed:  closed,
		entries: map[model.ContainerID]entry{},
	}
}

// add keeps an entry until forget, or until no successor has come in time.
func (o *orphans) add(e entry) (err error) {
	if e.Orphaned.IsZero() {
		e.Orphaned = time.Now()
		err = o.table.keep(&e)
	}

	o.mu.Lock()
	other := o.entries[e.Container]
	o.entries[e.Container] = e
	o.mu.Unlock()
	if other.FIFO != "" && other.FIFO != e.FIFO {
		o.table.forget(&other)
	}

	// A container that was removed meanwhile has no successor.
	time.AfterFunc(o.away-time.Since(e.Orphaned), o.forgetOld)

	return err
}

// find returns the entry of a container, an empty one if there is none.
func (o *orphans) find(container model.ContainerID) entry {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.entries[container]
}

// forget removes the entry of a container, and those whose engine has stayed away too long.
func (o *orphans) forget(container model.ContainerID) {
	o.mu.Lock()
	var old []entry
	for c, e := range o.entries {
		if c == container || time.Since(e.Orphaned) >= o.away {
			old = append(old, e)
			delete(o.entries, c)
		}
	}

	o.mu.Unlock()
	for _, e := range old {
		o.table.forget(&e)
	}
}

// forgetOld removes the entries whose engine has stayed away too long. After Close the table is the
// next process's.
func (o *orphans) forgetOld() {
	if !isClosed(o.closed) {
		o.forget("")
	}
}
