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

// shared holds the resources of all streams. It has no reference to a stream or the Driver.
type shared struct {
	logger     *slog.Logger
	metrics    *metrics
	alarms     *alarms
	poller     *poller
	buffers    *pool
	table      *table
	stallLimit time.Duration // Config.StallLimit
	pause      time.Duration // Config.Pause
	// disconnected is the time the last watching daemon disconnected, or nil.
	disconnected atomic.Pointer[time.Time]
}

// stream moves one container's output from its FIFO to its log. Its states are:
//
//   - writing: each batch goes to the log.
//   - spilling (spill.size > 0): a frame larger than the pipes moves through a file.
//   - holding (isHoldingLocked): the log was just rotated, and writes are on hold.
//   - settling: the log is checked for a while longer even without new output.
//   - stalled (guardLocked): the disk does not respond, and output is dropped.
//   - closed: finishLocked has run.
type stream struct {
	*shared
	logger  *slog.Logger // with the container's name
	opened  time.Time
	ready   chan struct{} // receives from the poller when data is pending
	changed notifier      // after each batch, and at the end
	ended   chan struct{} // closed after the last batch

	busy     chan struct{} // the lock, full while held; guards the fields below
	fifo     int
	entry    entry     // only Inode and Before change
	log      *os.File  // nil while it cannot be opened
	checked  time.Time // time of the last check of the log, or of the last attempt to open it
	rotated  time.Time // time of the last Reopen
	clock    clock
	closed   bool
	losses   losses
	spill    *spill
	size     int       // capacity of the FIFO, in bytes
	lastGrow time.Time // the last request for a larger FIFO
	window   int       // maximum size of a peek, in bytes
	cut      int       // size of the incomplete frame of the last peek
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

// lockFor locks the stream, or returns ctx's error. A disk operation may hold the lock for long.
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
	s.alarms.add(alarmPipes, -countSmall(s.size))

	if s.log != nil {
		if err := s.undoRotationLocked(); err != nil {
			s.logger.Error("the kubelet reverted a log rotation; lines written since then are lost", "err", err)
		}
		s.log.Close()
	}

	close(s.ended)
	s.changed.notify()
}

const (
	// unreadablePause is the pause after an unexpected error of the FIFO.
	unreadablePause = time.Second
	// openTimeout limits the wait for the engine to open a FIFO for writing. The engine does so in
	// parallel to its StartLogging, usually before it.
	openTimeout = 10 * time.Second
)

// run moves batches until the stream is closed. It returns true if the engine has ended instead.
func (s *stream) run() (engineEnded bool) {
	for {
		isFast, err := s.move()
		switch {
		case errors.Is(err, os.ErrClosed):
			return false
		case errors.Is(err, errHolding):
			s.sleep(holdTime / 4)
		case errors.Is(err, errSettling):
			s.await(checkInterval)
		case errors.Is(err, errEmpty):
			s.await(0)
		case errors.Is(err, io.EOF):
			if !s.isAwaitingWriter() {
				return true
			}
			s.await(openTimeout)

		case errors.Is(err, errIncomplete): // the engine is writing the frame, unless it has died
			s.sleep(s.pause)
		case isShortage(err):
			s.alarms.raise(alarmDescriptors)
			s.sleep(alarmInterval)
		case err != nil:
			s.logger.Error("cannot read a container's output", "err", err)
			s.sleep(unreadablePause)
		case !isFast:
			s.sleep(s.pause)
		}
	}
}

// move moves one batch. isFast means that the batch was at least half of the maximum size of a
// peek.
func (s *stream) move() (isFast bool, err error) {
	s.lock()
	defer s.unlock()

	if s.closed {
		return false, os.ErrClosed
	}
	if s.isHoldingLocked() {
		return false, errHolding
	}

	n, err := s.moveLocked()
	if errors.Is(err, errEmpty) && time.Since(s.rotated) < settleTime {
		s.guardLocked(0, func() { err = s.ensureLinkedLocked() })
		return false, errors.Join(errSettling, err)
	}

	return n >= s.window/2, err
}

// await waits until data is pending in the FIFO or its writers have ended, but not longer than
// timeout; 0 means no limit.
func (s *stream) await(timeout time.Duration) {
	s.lock()
	var err error
	if !s.closed {
		err = s.poller.arm(s.fifo)
	}

	s.unlock()
	if err != nil {
		s.logger.Error("cannot poll a container's FIFO", "err", err)
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

// isAwaitingWriter reports whether a FIFO has had no writer yet, and the engine may still open it.
func (s *stream) isAwaitingWriter() bool {
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

// growIfIdle grows the FIFO, unless a batch is in progress.
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

// growFIFOLocked requests the full capacity for a smaller FIFO, at most every growInterval.
func (s *stream) growFIFOLocked() {
	if s.size >= fifoSize || time.Since(s.lastGrow) < growInterval {
		return
	}
	s.lastGrow = time.Now()
	before := countSmall(s.size)
	s.size = growPipe(s.fifo, fifoSize, s.buffers.pipeSize)
	s.alarms.add(alarmPipes, countSmall(s.size)-before)
}
