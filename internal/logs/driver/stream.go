package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// stream is the way of one container's output, from its FIFO to its log.
type stream struct {
	d       *Driver
	opened  time.Time
	ready   chan struct{} // told by the poller
	changed notifier      // told after each batch, and at the end
	ended   chan struct{} // closed when nothing more will come

	busy    chan struct{} // the lock, full while held; guards all below
	fifo    int
	entry   entry     // only Inode and Before change
	log     *os.File  // nil while it cannot be opened
	checked time.Time // when the log was last seen to be there, or tried
	rotated time.Time // when the last Reopen was
	clock   clock
	closed  bool
	losses  losses
}

// open opens the FIFO. The log is opened later.
func (d *Driver) open(e entry) (*stream, error) {
	if err := e.Log.check(); err != nil {
		return nil, err
	}
	fd, err := unix.Open(e.FIFO, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open Docker's FIFO %s: %w", e.FIFO, err)
	}
	s := &stream{
		d: d, fifo: fd, opened: time.Now(), entry: e, ready: make(chan struct{}, 1), busy: make(chan struct{}, 1), ended: make(chan struct{}),
		losses: losses{d: d, name: e.Name},
	}
	if err := d.poller.add(fd, s.ready); err != nil { // also what is no FIFO
		return nil, errors.Join(fmt.Errorf("watch Docker's FIFO %s: %w", e.FIFO, err), unix.Close(fd))
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, fifoSize); err != nil {
		d.cfg.Log.Debug("a FIFO keeps its size", "container", e.Name, "err", err)
	}
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

// finish ends the stream; the lock is held.
func (s *stream) finish() {
	if s.closed {
		return
	}
	s.closed = true
	s.d.poller.remove(s.fifo)
	unix.Close(s.fifo)
	if s.log != nil {
		if err := s.undoRotation(false); err != nil {
			s.d.cfg.Log.Error("the kubelet took a rotation back, and what was written since then is lost", "container", s.entry.Name, "err", err)
		}
		s.log.Close()
	}
	close(s.ended)
	s.changed.tell()
}

// run moves batches until the stream is closed or the engine has gone.
func (s *stream) run() {
	for cut := time.Duration(0); ; {
		n, err := s.lockedStep()
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case errors.Is(err, errResting):
			s.sleep(rest / 4)
		case errors.Is(err, errSettling):
			s.await(checkEvery)
		case errors.Is(err, errNothing):
			s.await(0)
		case errors.Is(err, io.EOF):
			if !s.mayCome() {
				s.orphaned()
				return
			}
			s.await(openPatience)
		case errors.Is(err, errCut): // the engine is writing it, unless it has died over it
			cut = min(max(2*cut, s.d.cfg.Pause), time.Second)
			s.sleep(cut)
			continue
		case err != nil:
			s.d.cfg.Log.Error("a container's output cannot be read", "container", s.entry.Name, "err", err)
			s.sleep(time.Second)
		case n < batchSize/2: // else it is in a hurry
			s.sleep(s.d.cfg.Pause)
		}
		cut = 0
	}
}

func (s *stream) lockedStep() (int, error) {
	s.lock()
	defer s.unlock()
	if s.closed {
		return 0, os.ErrClosed
	}
	if s.resting() {
		return 0, errResting
	}
	n, err := s.step()
	if errors.Is(err, errNothing) && time.Since(s.rotated) < settled {
		s.guard(0, func() { err = s.ensureThere() })
		return 0, errors.Join(errSettling, err)
	}
	return n, err
}

// await waits until something waits in the FIFO or its writers have gone, for patience if that is not 0.
func (s *stream) await(patience time.Duration) {
	s.lock()
	var err error
	if !s.closed {
		err = s.d.poller.arm(s.fifo)
	}
	s.unlock()
	if err != nil {
		s.d.cfg.Log.Error("a container's FIFO cannot be watched", "container", s.entry.Name, "err", err)
		patience = time.Second
	}
	var late <-chan time.Time
	if patience > 0 {
		t := time.NewTimer(patience)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-s.ready:
	case <-s.ended:
	case <-late:
	}
}

// openPatience is for the engine to open a FIFO for writing. It does so beside its StartLogging, mostly before.
const openPatience = 10 * time.Second

// mayCome says whether a FIFO without a writer has not had one since we opened it, and may have one soon.
func (s *stream) mayCome() bool {
	s.lock()
	defer s.unlock()
	if s.closed || time.Since(s.opened) >= openPatience {
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

// orphaned ends a stream whose engine has gone without a word.
func (s *stream) orphaned() {
	s.lock()
	s.abandon()
	s.unlock()
	s.d.removeFIFO(s.entry.FIFO)
	s.d.drop(s) // last, so that whoever does not find it finds nothing of it
}

// abandon finishes a stream whose engine has gone, and keeps its entry for the successor. The lock is held.
func (s *stream) abandon() {
	if s.closed {
		return
	}
	s.finish()
	if err := s.d.remember(s.entry); err != nil {
		s.d.cfg.Log.Warn("lines may be lost if the engine comes back while the kubelet rotates the log", "container", s.entry.Name, "err", err)
	}
}

// drain moves all that waits; the lock is held.
func (s *stream) drain() {
	for err := error(nil); err == nil && !s.closed; {
		_, err = s.step()
	}
}

// step moves one batch from the FIFO to the log, and says how long it was in the FIFO. The lock is held.
func (s *stream) step() (int, error) {
	b, err := s.d.takeScratch()
	if err != nil {
		return 0, err
	}
	defer s.d.giveScratch(b)
	waiting, err := b.look(s.fifo)
	if err != nil {
		return 0, err
	}
	used, err := s.render(b, waiting)
	if errors.Is(err, errMalformed) && used == 0 {
		s.losses.add(1, reasonMalformed, err)
		return len(waiting), b.consume(s.fifo, len(waiting))
	}
	if used == 0 {
		return 0, errCut
	}
	late := s.guard(used, func() { s.write(b) })
	s.changed.tell()
	if late {
		return used, nil
	}
	return used, b.consume(s.fifo, used)
}

// guard does something with the log, for which a batch of that length waits. When it takes too long, that batch and all that comes is
// discarded meanwhile, and guard is true. The lock is held.
func (s *stream) guard(batch int, do func()) (late bool) {
	return guarded(s.d.cfg.StallLimit, do, func(stop <-chan struct{}) { s.discard(s.fifo, batch, stop) })
}

// render makes the log's lines of all whole frames. It returns the length of these frames, and errMalformed where it lost step.
func (s *stream) render(b *scratch, waiting []byte) (used int, err error) {
	b.out, b.ends = b.out[:0], b.ends[:0]
	for {
		f, n, err := next(waiting[used:])
		if err != nil {
			return used, err
		}
		used += n
		b.out = s.clock.appendRecords(b.out, f)
		b.ends = append(b.ends, len(b.out))
	}
}

// write writes a batch to the log. What the disk does not take is dropped, so that the container can go on. The lock is held.
func (s *stream) write(b *scratch) {
	if err := s.ensureLog(); err != nil {
		s.losses.add(len(b.ends), reasonDisk, err)
		return
	}
	n, err := s.log.Write(b.out)
	whole, end := 0, 0
	for whole < len(b.ends) && b.ends[whole] <= n {
		end = b.ends[whole]
		whole++
	}
	s.d.metrics.lines.Add(float64(whole))
	s.d.metrics.bytes.Add(float64(end))
	if err == nil {
		s.losses.over()
		return
	}
	if st, statErr := s.log.Stat(); n > end && statErr == nil {
		err = errors.Join(err, s.log.Truncate(st.Size()-int64(n-end))) // a torn line would spoil the next one
	}
	s.losses.add(len(b.ends)-whole, reasonDisk, err)
}

// checkEvery is how often a log is looked after that somebody may have deleted, or that could not be opened.
const checkEvery = time.Second

// ensureLog opens a log that is not open, or was deleted with its directory. The lock is held.
func (s *stream) ensureLog() error {
	if s.log != nil {
		return s.ensureThere()
	}
	if time.Since(s.checked) < checkEvery {
		return s.losses.last
	}
	s.checked = time.Now()
	s.losses.last = s.openLog()
	s.note()
	return s.losses.last
}

// ensureThere looks after a log that is open, and may have been deleted or renamed over. The lock is held.
func (s *stream) ensureThere() error {
	if time.Since(s.checked) < checkEvery {
		return nil
	}
	s.checked = time.Now()
	if !unlinked(s.log) {
		return nil
	}
	err := s.undoRotation(false)
	if err == nil && unlinked(s.log) {
		err = s.openLog()
	}
	s.note()
	return err
}

// openLog opens the log anew, at its path. The lock is held, or nobody else knows the stream. On error the old file is kept.
func (s *stream) openLog() error {
	f, err := s.entry.Log.open()
	if err != nil {
		return err
	}
	return s.writeTo(f)
}

// writeTo lets the log be f from now on.
func (s *stream) writeTo(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if s.log != nil {
		s.log.Close()
	}
	s.log, s.checked, s.entry.Inode, s.entry.Before = f, time.Now(), inodeOf(st), 0
	return nil
}

// note writes the table's entry anew.
func (s *stream) note() {
	if err := s.entry.keep(s.d.cfg.Directory); err != nil {
		s.d.cfg.Log.Warn("lines may stand twice in a container's log after the next crash", "container", s.entry.Name, "err", err)
	}
}

// reconcile goes on where a killed process ended: it finds what had been written and not yet consumed, and consumes it. It comes before run.
func (s *stream) reconcile() error {
	return errors.Join(s.goOnIn(s.entry.Inode, s.entry.Before, s.skipWritten), s.entry.keep(s.d.cfg.Directory))
}

// goOnIn opens the file that was written before, under whatever name it is now: after a rename by the kubelet it is written until Reopen,
// since the kubelet may rename it back over whatever stands there. Another is opened only if it was deleted. The file that was written before
// that is noted. look, if not nil, sees the file first.
func (s *stream) goOnIn(inode, before uint64, look func(*os.File) error) error {
	f, err := s.entry.Log.byInode(inode)
	switch {
	case err == nil:
		if look != nil {
			err = look(f)
		}
		err = errors.Join(err, s.writeTo(f))
	case errors.Is(err, fs.ErrNotExist):
		err, before = nil, inode
	}
	if s.log == nil {
		if openErr := s.openLog(); openErr != nil {
			s.losses.last = openErr // the log comes when it can
			return errors.Join(err, openErr)
		}
	}
	s.renamedFrom(before)
	return err
}

// skipWritten consumes the frames that stand at the end of f already.
func (s *stream) skipWritten(f *os.File) error {
	written, err := tail(f)
	if err != nil {
		return err
	}
	b, err := s.d.takeScratch()
	if err != nil {
		return err
	}
	defer s.d.giveScratch(b)
	waiting, err := b.look(s.fifo)
	if errors.Is(err, errNothing) || errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	_, _ = s.render(b, waiting) // whatever stopped it is met again
	return b.consume(s.fifo, framesIn(waiting, alreadyWritten(b, written)))
}

// alreadyWritten is how many of the first frames of a batch stand at the end of a log. Their times, in nanoseconds, make them unmistakable.
func alreadyWritten(b *scratch, written []byte) int {
	for n := len(b.ends); n > 0; n-- {
		if bytes.HasSuffix(written, b.out[:b.ends[n-1]]) {
			return n
		}
	}
	return 0
}

// framesIn is the length of the first n frames.
func framesIn(b []byte, n int) (size int) {
	for range n {
		_, k, err := next(b[size:])
		if err != nil {
			return size
		}
		size += k
	}
	return size
}
