package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// shared is what all streams use. Nothing in it knows a stream or the Driver.
type shared struct {
	logger     *slog.Logger
	metrics    *metrics
	alarms     *alarms
	poller     *poller
	buffers    *pool
	table      *table
	stallLimit time.Duration // Config.StallLimit
	pause      time.Duration // Config.Pause
	// left is when a daemon that watched this process last disconnected; nil before.
	left atomic.Pointer[time.Time]
}

// stream moves one container's output from its FIFO to its log. Its states are:
//
//   - writing: each batch goes to the log.
//   - spilling (spill.size > 0): a frame larger than the pipes moves through a file.
//   - resting (isRestingLocked): the log was rotated a moment ago, and nothing is written yet.
//   - settling: a while longer the log is checked although nothing arrives.
//   - stalled (guardLocked): the disk does not answer, and output is dropped.
//   - closed: after finishLocked, for good.
type stream struct {
	*shared
	logger  *slog.Logger // names the container
	opened  time.Time
	ready   chan struct{} // the poller sends when something waits in the FIFO
	changed notifier      // after each batch, and at the end
	ended   chan struct{} // closed when nothing more will come

	busy    chan struct{} // the lock, full while held; guards all below
	fifo    int
	entry   entry     // only Inode and Before change
	log     *os.File  // nil while it cannot be opened
	checked time.Time // the last check that the log is still there, or the last attempt to open it
	rotated time.Time // the last Reopen
	clock   clock
	closed  bool
	losses  losses
	spill   *spill
	size    int       // capacity of the FIFO, in bytes
	grown   time.Time // the last request for a larger FIFO
	window  int       // how much one peek can show, in bytes
	cut     int       // how much of a frame the last peek showed, if that was less than all of it
}

// openStream opens the FIFO of an entry. The log is opened later.
func openStream(sh *shared, e entry) (_ *stream, err error) {
	fd, err := sh.table.openFIFO(e.FIFO)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}()

	part, err := sh.table.openSpill(&e)
	if err != nil {
		return nil, fmt.Errorf("open Docker's FIFO %s: %w", e.FIFO, err)
	}

	logger := sh.logger.With("container", e.Name)
	s := &stream{
		shared: sh,
		logger: logger,
		fifo:   fd,
		opened: time.Now(),
		entry:  e,
		ready:  make(chan struct{}, 1),
		busy:   make(chan struct{}, 1),
		ended:  make(chan struct{}),
		losses: newLosses(logger, sh.metrics),
		spill:  part,
	}
	if err := sh.poller.add(fd, s.ready); err != nil {
		part.close()
		return nil, fmt.Errorf("watch Docker's FIFO %s: %w", e.FIFO, err)
	}

	s.growFIFOLocked()

	return s, nil
}

func (s *stream) lock()   { s.busy <- struct{}{} }
func (s *stream) unlock() { <-s.busy }

// lockFor gives up with ctx's error: a disk may hold the lock for long.
func (s *stream) lockFor(ctx context.Context) error {
	select {
	case s.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// finish ends the stream.
func (s *stream) finish() {
	s.lock()
	defer s.unlock()
	s.finishLocked()
}

func (s *stream) finishLocked() {
	if s.closed {
		return
	}

	s.closed = true
	s.poller.remove(s.fifo)
	unix.Close(s.fifo)
	s.spill.close()
	s.alarms.add(alarmPipes, -small(s.size))

	if s.log != nil {
		if err := s.undoRotationLocked(false); err != nil {
			s.logger.Error("the kubelet undid a rotation, and the lines written since then are lost", "err", err)
		}
		s.log.Close()
	}

	close(s.ended)
	s.changed.notify()
}

const (
	// unreadablePause is the pause after an error of the FIFO that nobody expects.
	unreadablePause = time.Second
	// openTimeout is for the engine to open a FIFO for writing. It does so beside its StartLogging,
	// mostly before.
	openTimeout = 10 * time.Second
)

// run moves batches until the stream is closed. It returns true if the engine has ended instead.
func (s *stream) run() (engineEnded bool) {
	for {
		isFast, err := s.move()
		switch {
		case errors.Is(err, os.ErrClosed):
			return false
		case errors.Is(err, errResting):
			s.sleep(restTime / 4)
		case errors.Is(err, errSettling):
			s.await(checkInterval)
		case errors.Is(err, errNothing):
			s.await(0)
		case errors.Is(err, io.EOF):
			if !s.mayOpen() {
				return true
			}
			s.await(openTimeout)

		case errors.Is(err, errCut): // the engine is writing it, unless it has died meanwhile
			s.sleep(s.pause)
		case isShortage(err):
			s.alarms.raise(alarmDescriptors)
			s.sleep(tendInterval)
		case err != nil:
			s.logger.Error("a container's output cannot be read", "err", err)
			s.sleep(unreadablePause)
		case !isFast:
			s.sleep(s.pause)
		}
	}
}

// move moves one batch. isFast means that the writer has half filled what one peek shows.
func (s *stream) move() (isFast bool, err error) {
	s.lock()
	defer s.unlock()

	if s.closed {
		return false, os.ErrClosed
	}
	if s.isRestingLocked() {
		return false, errResting
	}

	n, err := s.moveLocked()
	if errors.Is(err, errNothing) && time.Since(s.rotated) < settleTime {
		s.guardLocked(0, func() { err = s.ensureThereLocked() })
		return false, errors.Join(errSettling, err)
	}

	return n >= s.window/2, err
}

// await waits until something waits in the FIFO or its writers have ended, at most for timeout
// unless that is 0.
func (s *stream) await(timeout time.Duration) {
	s.lock()
	var err error
	if !s.closed {
		err = s.poller.arm(s.fifo)
	}

	s.unlock()
	if err != nil {
		s.logger.Error("a container's FIFO cannot be watched", "err", err)
		timeout = unreadablePause
	}

	var late <-chan time.Time
	if timeout > 0 {
		t := time.NewTimer(timeout)
		defer t.Stop()
		late = t.C
	}

	select {
	case <-s.ready:
	case <-s.ended:
	case <-late:
	}
}

// mayOpen reports whether a FIFO has had no writer since it was opened, and may have one soon.
func (s *stream) mayOpen() bool {
	s.lock()
	defer s.unlock()

	if s.closed || time.Since(s.opened) >= openTimeout {
		return false
	}

	p := []unix.PollFd{{Fd: int32(s.fifo), Events: unix.POLLIN}}
	_, err := retry(func() (int64, error) { n, err := unix.Poll(p, 0); return int64(n), err })

	return err == nil && p[0].Revents&unix.POLLHUP == 0
}

func (s *stream) sleep(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.ended:
	}
}

// growIfIdle lets the FIFO grow, unless a batch is being moved.
func (s *stream) growIfIdle() {
	select {
	case s.busy <- struct{}{}:
		defer s.unlock()
		if !s.closed {
			s.growFIFOLocked()
		}
	default:
	}
}

// growFIFOLocked asks for the capacity that the FIFO shall have, if it has less, at most every
// growInterval.
func (s *stream) growFIFOLocked() {
	if s.size >= fifoSize || time.Since(s.grown) < growInterval {
		return
	}
	s.grown = time.Now()
	before := small(s.size)
	s.size = growPipe(s.fifo, fifoSize, s.buffers.pipeSize)
	s.alarms.add(alarmPipes, small(s.size)-before)
}
