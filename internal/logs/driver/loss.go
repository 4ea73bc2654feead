package driver

import (
	"errors"
	"io"
	"sync"
	"time"
)

// guarded runs write and, if that has not returned after limit, instead beside it until it has. It returns when both have, and says
// whether write was late.
func guarded(limit time.Duration, write func(), instead func(stop <-chan struct{})) (late bool) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	t := time.AfterFunc(limit, func() {
		defer close(stopped)
		instead(stop)
	})
	write()
	if t.Stop() {
		return false
	}
	close(stop)
	<-stopped
	return true
}

// discardEvery is the pause between two looks at a FIFO whose output is being dropped.
const discardEvery = 20 * time.Millisecond

// discard consumes the batch that a write hangs on, and then all that comes, until stop: a container must not wait for a disk for ever.
func (s *stream) discard(fifo, batch int, stop <-chan struct{}) {
	log := s.d.cfg.Log.With("container", s.entry.Name, "log", s.entry.Log.String())
	log.Error("the disk does not answer; the container's output is dropped meanwhile")
	b, err := s.d.takeScratch()
	if err != nil {
		log.Error("output cannot be dropped, the container waits", "err", err)
		return
	}
	defer s.d.giveScratch(b)
	if err := errors.Join(s.spill.clearWhole(), b.consume(fifo, batch)); err != nil {
		log.Error("output cannot be dropped, the container waits", "err", err)
		return
	}
	lost := 0
	defer func() {
		s.d.metrics.dropped.WithLabelValues(reasonStalled).Add(float64(lost))
		log.Error("the disk answers again", "dropped", lost)
	}()
	tick := time.NewTicker(discardEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		n, err := s.discardAll(fifo, b)
		lost += n
		if err != nil {
			log.Error("output cannot be dropped, the container waits", "err", err)
			return
		}
	}
}

// discardAll consumes all whole frames that wait and counts them.
func (s *stream) discardAll(fifo int, b *scratch) (frames int, err error) {
	for {
		n, err := s.discardBatch(fifo, b)
		frames += n
		if errors.Is(err, errNothing) || errors.Is(err, io.EOF) {
			return frames, nil
		}
		if err != nil {
			return frames, err
		}
	}
}

// discardBatch consumes the whole frames that a look shows, or the one that no look can show.
func (s *stream) discardBatch(fifo int, b *scratch) (frames int, err error) {
	used := 0
	if s.spill.size == 0 {
		waiting, err := b.look(fifo)
		if err != nil {
			return 0, err
		}
		for {
			_, n, err := next(waiting[used:])
			if errors.Is(err, errMalformed) {
				n = malformedIn(waiting[used:])
			} else if err != nil {
				break
			}
			used += n
			frames++
		}
	}
	if used > 0 {
		return frames, b.consume(fifo, used)
	}

	if err := s.spill.fill(fifo); err != nil && !errors.Is(err, errMalformed) {
		return 0, err
	}
	return 1, s.spill.clear()
}

// losses counts what of a container's output was dropped, and says so in the log when it begins and when it is over, not at each line.
type losses struct {
	d    *Driver
	name string
	last error     // why the log could not be opened
	lost int       // since it was last said that it is over
	said time.Time // when it last began
}

// sayEvery keeps a disk that is full again and again from filling the daemon's own log.
const sayEvery = time.Minute

func (l *losses) add(lines int, reason string, why error) {
	l.d.metrics.dropped.WithLabelValues(reason).Add(float64(lines))
	if l.lost == 0 && time.Since(l.said) > sayEvery {
		l.said = time.Now()
		l.d.cfg.Log.Error("a container's output is dropped", "container", l.name, "err", why)
	}
	l.lost += lines
}

func (l *losses) over() {
	if l.lost == 0 {
		return
	}
	l.d.cfg.Log.Info("a container's output is written again", "container", l.name, "dropped", l.lost)
	l.lost = 0
}

// notifier tells any number of waiters that something has changed.
type notifier struct {
	mu sync.Mutex // guards ch
	ch chan struct{}
}

// next is closed at the next change.
func (n *notifier) next() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch == nil {
		n.ch = make(chan struct{})
	}
	return n.ch
}

func (n *notifier) tell() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch != nil {
		close(n.ch)
		n.ch = nil
	}
}
