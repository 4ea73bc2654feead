package driver

import (
	"errors"
	"io"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// guarded runs write and, if that has not returned after limit, runs instead beside it until it
// has. It returns when both have, and reports whether write was late.
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

// discardInterval is the pause between two peeks at a FIFO whose output is being dropped.
const discardInterval = 20 * time.Millisecond

// discardLocked consumes the batch that a stalled write holds, and then all that arrives, until
// stop: a container must not wait for a disk for ever. The stalled write has the lock on its
// behalf.
func (s *stream) discardLocked(batch int, stop <-chan struct{}) {
	logger := s.logger.With("log", s.entry.Log.String())
	logger.Error("the disk does not answer; the container's output is dropped meanwhile")
	if err := s.discardUntil(logger, batch, stop); err != nil {
		logger.Error("output cannot be dropped, the container waits", "err", err)
	}
}

func (s *stream) discardUntil(logger *slog.Logger, batch int, stop <-chan struct{}) error {
	b, err := s.buffers.take()
	if err != nil {
		return err
	}
	defer s.buffers.give(b)

	if err := errors.Join(s.spill.clearWhole(), b.consume(s.fifo, batch)); err != nil {
		return err
	}

	dropped := 0
	defer func() {
		s.metrics.dropped.WithLabelValues(reasonStalled).Add(float64(dropped))
		logger.Error("the disk answers again", "dropped", dropped)
	}()

	tick := time.NewTicker(discardInterval)
	defer tick.Stop()

	for {
		select {
		case <-stop:
			return nil
		case <-tick.C:
		}

		n, err := s.discardAll(b)
		dropped += n
		if err != nil {
			return err
		}
	}
}

// discardAll consumes all whole frames that wait and counts them.
func (s *stream) discardAll(b *scratch) (frames int, err error) {
	for {
		n, err := s.discardBatch(b)
		frames += n
		if errors.Is(err, errNothing) || errors.Is(err, io.EOF) {
			return frames, nil
		}

		if err != nil {
			return frames, err
		}
	}
}

// discardBatch consumes the whole frames that a peek shows, or the one that no peek can show.
func (s *stream) discardBatch(b *scratch) (frames int, err error) {
	used := 0
	if s.spill.size == 0 {
		waiting, err := b.peek(s.fifo)
		if err != nil {
			return 0, err
		}
		frames, used = countFrames(waiting)
	}

	if used > 0 {
		return frames, b.consume(s.fifo, used)
	}

	if err := s.spill.fill(s.fifo); err != nil && !errors.Is(err, errMalformed) {
		return 0, err
	}

	return 1, s.spill.clear()
}

// countFrames returns the number of whole frames and malformed messages in b, and their length.
func countFrames(b []byte) (frames, size int) {
	for {
		_, n, err := next(b[size:])
		if errors.Is(err, errMalformed) {
			n = malformedIn(b[size:])
		} else if err != nil {
			return frames, size
		}

		size += n
		frames++
	}
}

// lossInterval keeps a disk that is full again and again from filling the daemon's own log.
const lossInterval = time.Minute

// losses counts the dropped lines of a container. It logs when a loss begins and when it is over,
// not at each line.
type losses struct {
	logger  *slog.Logger
	dropped *prometheus.CounterVec
	begin   rate.Sometimes
	count   int   // since the last loss was over
	openErr error // why the log could not be opened
}

func newLosses(logger *slog.Logger, m *metrics) losses {
	return losses{
		logger:  logger,
		dropped: m.dropped,
		begin:   rate.Sometimes{Interval: lossInterval},
	}
}

func (l *losses) add(lines int, reason string, why error) {
	l.dropped.WithLabelValues(reason).Add(float64(lines))
	if l.count == 0 {
		l.begin.Do(func() { l.logger.Error("a container's output is dropped", "err", why) })
	}
	l.count += lines
}

func (l *losses) over() {
	if l.count == 0 {
		return
	}
	l.logger.Info("a container's output is written again", "dropped", l.count)
	l.count = 0
}
