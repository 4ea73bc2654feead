package driver

import (
	"errors"
	"io"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// runGuarded runs write. If write takes longer than limit, it also runs instead until write
// returns. It returns after both have returned, and reports whether write was late.
func runGuarded(limit time.Duration, write func(), instead func(stop <-chan struct{})) (late bool) {
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

// discardInterval is the pause between two peeks at a FIFO while its output is dropped.
const discardInterval = 20 * time.Millisecond

// discardLocked consumes the batch of a stalled write, and then all new output until stop is
// closed. A container must not wait for a disk forever. The stalled write holds the lock on its
// behalf.
func (s *stream) discardLocked(batch int, stop <-chan struct{}) {
	logger := s.logger.With("log", s.entry.Log.String())
	logger.Error("the disk does not respond; dropping the container's output")
	if err := s.discardUntil(logger, batch, stop); err != nil {
		logger.Error("cannot drop output; the container is blocked", "err", err)
	}
}

func (s *stream) discardUntil(logger *slog.Logger, batch int, stop <-chan struct{}) error {
	b, err := s.buffers.get()
	if err != nil {
		return err
	}
	defer s.buffers.put(b)

	if err := errors.Join(s.spill.clearComplete(), b.consume(s.fifo, batch)); err != nil {
		return err
	}

	dropped := 0
	defer func() {
		s.metrics.dropped.WithLabelValues(reasonStalled).Add(float64(dropped))
		logger.Error("the disk responds again", "dropped", dropped)
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

// discardAll consumes and counts all complete pending frames.
func (s *stream) discardAll(b *scratch) (frames int, err error) {
	for {
		n, err := s.discardBatch(b)
		frames += n
		if errors.Is(err, errEmpty) || errors.Is(err, io.EOF) {
			return frames, nil
		}

		if err != nil {
			return frames, err
		}
	}
}

// discardBatch consumes the complete frames of a peek, or one frame too large for a peek.
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

// countFrames returns the number of complete frames and malformed messages in b, and their length.
func countFrames(b []byte) (frames, size int) {
	for {
		_, n, err := nextFrame(b[size:])
		if errors.Is(err, errMalformed) {
			n = malformedSize(b[size:])
		} else if err != nil {
			return frames, size
		}

		size += n
		frames++
	}
}

// lossInterval limits the daemon's own log messages about a repeatedly full disk.
const lossInterval = time.Minute

// losses counts the dropped lines of a container. It logs the beginning and the end of a loss, not
// each line.
type losses struct {
	logger  *slog.Logger
	dropped *prometheus.CounterVec
	begin   rate.Sometimes
	count   int   // in the current loss
	openErr error // error of the last attempt to open the log
}

func newLosses(logger *slog.Logger, m *metrics) losses {
	return losses{
		logger:  logger,
		dropped: m.dropped,
		begin:   rate.Sometimes{Interval: lossInterval},
	}
}

func (l *losses) add(lines int, reason string, cause error) {
	l.dropped.WithLabelValues(reason).Add(float64(lines))
	if l.count == 0 {
		l.begin.Do(func() { l.logger.Error("dropping the output of a container", "err", cause) })
	}
	l.count += lines
}

func (l *losses) end() {
	if l.count == 0 {
		return
	}
	l.logger.Info("writing the output of a container again", "dropped", l.count)
	l.count = 0
}
