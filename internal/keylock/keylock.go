// Package keylock serialises work by key. A waiting caller gives up when its context ends.
package keylock

import (
	"context"
	"sync"
)

// Map is a set of locks, one for each key in use. The zero value is ready for use.
type Map struct {
	mu    sync.Mutex // guards locks
	locks map[string]*lock
}

type lock struct {
	held  chan struct{} // holds one element while the lock is taken
	users int           // holders and waiters; the last one removes the entry
}

// New returns an empty Map.
func New() *Map { return &Map{locks: map[string]*lock{}} }

// Lock acquires the lock of key. It returns ctx's error if ctx ends first. Otherwise the caller
// must call unlock once.
func (m *Map) Lock(ctx context.Context, key string) (unlock func(), err error) {
	m.mu.Lock()
	l := m.locks[key]
	if l == nil {
		if m.locks == nil {
			m.locks = map[string]*lock{}
		}
		l = &lock{held: make(chan struct{}, 1)}
		m.locks[key] = l
	}

	l.users++
	m.mu.Unlock()
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; m.releaseRef(key, l) }, nil
	case <-ctx.Done():
		m.releaseRef(key, l)
		return nil, ctx.Err()
	}
}

// Waiting returns the number of callers waiting for the lock of key.
func (m *Map) Waiting(key string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.locks[key]
	if l == nil {
		return 0
	}
	return l.users - len(l.held)
}

func (m *Map) releaseRef(key string, l *lock) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(m.locks, key)
	}
}
