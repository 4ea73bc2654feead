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
	spill   *spill
	size    int       // capacity of the FIFO, in bytes
	grown   time.Time // when the FIFO was last asked to grow
	window  int       // how much one look can show, in bytes
	cut     int       // how much of a frame the last look showed, if that was less than all of it
}

// open opens the FIFO. The log is opened later.
func (d *Driver) open(e entry) (_ *stream, err error) {
	fd, err := d.openFIFO(e.FIFO)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	part, err := d.takeUpSpill(e)
	if err != nil {
		return nil, fmt.Errorf("open Docker's FIFO %s: %w", e.FIFO, err)
	}

	s := &stream{
		d:      d,
		fifo:   fd,
		opened: time.Now(),
		entry:  e,
		ready:  make(chan struct{}, 1),
		busy:   make(chan struct{}, 1),
		ended:  make(chan struct{}),
		losses: losses{d: d, name: e.Name},
		spill:  part,
	}
	if err := d.poller.add(fd, s.ready); err != nil {
		part.close()
		return nil, fmt.Errorf("watch Docker's FIFO %s: %w", e.FIFO, err)
	}
	s.growFIFO()
	return s, nil
}

// openFIFO opens a FIFO of the engine's: one in its directory, no link, and no other kind of file.
func (d *Driver) openFIFO(path string) (fd int, err error) {
	if err := d.checkFIFO(path); err != nil {
		return 0, err
	}
	fd, err = unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open Docker's FIFO %s: %w", path, err)
	}

	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFIFO {
		err = errors.New("it is no FIFO")
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("open Docker's FIFO %s: %w", path, err), unix.Close(fd))
	}
	return fd, nil
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
	s.spill.close()
	s.d.alarms.add(alarmPipes, -small(s.size))
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
	for {
		hurry, err := s.lockedStep()
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
			s.sleep(s.d.cfg.Pause)
		case isShortage(err):
			s.d.alarms.raise(alarmDescriptors)
			s.sleep(tendEvery)
		case err != nil:
			s.d.cfg.Log.Error("a container's output cannot be read", "container", s.entry.Name, "err", err)
			s.sleep(time.Second)
		case !hurry:
			s.sleep(s.d.cfg.Pause)
		}
	}
}

// lockedStep moves one batch. The writer is in a hurry if it has half filled what one look shows.
func (s *stream) lockedStep() (hurry bool, err error) {
	s.lock()
	defer s.unlock()
	if s.closed {
		return false, os.ErrClosed
	}
	if s.resting() {
		return false, errResting
	}
	n, err := s.step()
	if errors.Is(err, errNothing) && time.Since(s.rotated) < settled {
		s.guard(0, func() { err = s.ensureThere() })
		return false, errors.Join(errSettling, err)
	}
	return n >= s.window/2, err
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
	if err := errors.Join(s.spill.remove(), s.d.remember(s.entry)); err != nil {
		s.d.cfg.Log.Warn("lines may be lost if the engine comes back while the kubelet rotates the log", "container", s.entry.Name, "err", err)
	}
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
	f, planted, err := s.entry.Log.open()
	if err != nil {
		return err
	}
	if planted != nil {
		s.d.cfg.Log.Warn("somebody has put something in the place of a container's log; it is replaced", "container", s.entry.Name, "err", planted)
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
