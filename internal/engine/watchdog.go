package engine

import (
	"strings"
	"sync"
	"time"
)

// pullState is the state of a pull in the engine's download queue, derived from the engine's
// messages. The engine limits the concurrent downloads of all pulls together
// (max-concurrent-downloads in daemon.json).
type pullState int

const (
	// pullActive means that the engine works on a layer of the pull.
	pullActive pullState = iota
	// pullUnknown means that no layer has started. With containerd's image store, the messages do
	// not distinguish a queued layer from an unresponsive registry.
	pullUnknown
	// pullQueued means that all remaining layers are queued.
	pullQueued
)

// watchdog calls expired once if a pull makes no progress for the timeout, unless the pull is
// queued behind other downloads. It is safe for concurrent use.
type watchdog struct {
	timeout time.Duration // 0: never
	all     *activity     // of all pulls
	expired func(last string)

	mu     sync.Mutex // guards the fields below
	timer  *time.Timer
	ended  bool
	last   string // the last progress
	state  pullState
	status map[string]string // last status of each layer
}

func newWatchdog(timeout time.Duration, all *activity, expired func(last string)) *watchdog {
	w := &watchdog{
		timeout: timeout,
		all:     all,
		expired: expired,
		last:    "request sent",
		state:   pullUnknown,
		status:  map[string]string{},
	}
	if timeout > 0 {
		w.timer = time.AfterFunc(timeout, w.expire)
	}

	return w
}

// expire ends the watch, or extends it for a pull that may be queued while other pulls progress.
func (w *watchdog) expire() {
	remaining := w.timeout - w.all.idleTime()
	w.mu.Lock()
	defer w.mu.Unlock()

	if w.ended {
		return
	}

	switch {
	case w.state == pullQueued:
		w.timer.Reset(w.timeout)
	case w.state == pullUnknown && remaining > 0:
		w.timer.Reset(remaining)
	default:
		w.ended = true
		w.expired(w.last)
	}
}

// observe records a message about a layer and the state of the pull. Newer engines repeat messages
// while nothing progresses, so only a changed status counts as progress.
func (w *watchdog) observe(layer, status string, s pullState) {
	w.mu.Lock()
	defer w.mu.Unlock()

	w.state = s
	old, ok := w.status[layer]
	if ok && old == status {
		return
	}
	if ok || len(w.status) < maxLayers {
		w.status[layer] = status
	}

	w.last = strings.TrimSpace(layer + " " + status)
	if s == pullActive {
		w.all.record()
	}
	if w.timer != nil && !w.ended {
		w.timer.Reset(w.timeout)
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
