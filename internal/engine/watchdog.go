package engine

import (
	"strings"
	"sync"
	"time"
)

// turn says what a pull waits for, as far as the engine's messages show it. The engine downloads
// only a few layers at once, those of all pulls together (max-concurrent-downloads of daemon.json).
type turn int

const (
	// turnCame: the engine works on a layer of it.
	turnCame turn = iota
	// turnUnknown: no layer has begun. With containerd's image store a layer in the queue looks
	// like one whose registry does not answer.
	turnUnknown
	// turnQueued: the engine says that all its remaining layers wait.
	turnQueued
)

// watchdog calls bite once when a pull has not moved for a while, unless it waits for its turn
// behind other downloads. It is safe for concurrent use.
type watchdog struct {
	after time.Duration // 0: never
	all   *movement     // of all pulls
	bite  func(last string)

	mu    sync.Mutex // guards the rest
	timer *time.Timer
	ended bool
	last  string // the last news
	turn  turn
	seen  map[string]string
}

func newWatchdog(after time.Duration, all *movement, bite func(last string)) *watchdog {
	w := &watchdog{
		after: after,
		all:   all,
		bite:  bite,
		last:  "the request was sent",
		turn:  turnUnknown,
		seen:  map[string]string{},
	}
	if after > 0 {
		w.timer = time.AfterFunc(after, w.expire)
	}

	return w
}

// expire bites, or waits on for a pull whose turn has not come while others move.
func (w *watchdog) expire() {
	rest := w.after - w.all.since()
	w.mu.Lock()
	defer w.mu.Unlock()

	if w.ended {
		return
	}

	switch {
	case w.turn == turnQueued:
		w.timer.Reset(w.after)
	case w.turn == turnUnknown && rest > 0:
		w.timer.Reset(rest)
	default:
		w.ended = true
		w.bite(w.last)
	}
}

// saw takes a message about a layer, and what the pull waits for. Newer engines repeat what they
// have said while nothing moves, so only what is new counts.
func (w *watchdog) saw(layer, state string, t turn) {
	w.mu.Lock()
	defer w.mu.Unlock()

	w.turn = t
	old, ok := w.seen[layer]
	if ok && old == state {
		return
	}
	if ok || len(w.seen) < maxLayers {
		w.seen[layer] = state
	}

	w.last = strings.TrimSpace(layer + " " + state)
	if t == turnCame {
		w.all.note()
	}
	if w.timer != nil && !w.ended {
		w.timer.Reset(w.after)
	}
}

func (w *watchdog) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	if w.timer != nil {
		w.timer.Stop()
	}
}
