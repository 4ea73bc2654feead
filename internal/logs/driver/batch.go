package driver

import (
	"errors"
	"io"
	"os"
	"time"
)

// drain moves all that waits; the lock is held.
func (s *stream) drain() {
	for again := false; !s.closed; {
		_, err := s.step()
		if errors.Is(err, errCut) && !again { // the next step takes what does not grow
			again = true
			continue
		}
		if err != nil {
			return
		}
		again = false
	}
}

// step moves one batch from the FIFO to the log, and says how long it was in the FIFO. The lock is held.
func (s *stream) step() (int, error) {
	b, err := s.d.takeScratch()
	if err != nil {
		return 0, err
	}
	defer s.d.giveScratch(b)
	s.measure(b)
	if s.spill.size > 0 {
		return s.stepSpill(b)
	}

	waiting, err := b.look(s.fifo)
	if err != nil {
		return 0, err
	}
	used, err := s.render(b, waiting)
	if errors.Is(err, errMalformed) && used == 0 {
		s.losses.add(1, reasonMalformed, err)
		used = malformedIn(waiting)
		return used, b.consume(s.fifo, used)
	}
	if used == 0 {
		if s.grows(len(waiting)) {
			return 0, errCut
		}
		return s.stepSpill(b)
	}

	s.cut = 0
	held, late := s.put(b, used)
	if held != nil {
		return 0, held
	}
	if late {
		return used, nil
	}
	return used, b.consume(s.fifo, used)
}

// measure notes how much a look can show, and raises the alarm while that is less than usual. A
// FIFO and a scratch that are small are asked to grow from time to time.
func (s *stream) measure(b *scratch) {
	s.d.growScratch(b)
	s.growFIFO()
	s.window = min(b.size, s.size)
}

// grows says whether a frame of which only a beginning of this length is seen may be seen as a whole
// at the next look: its writer may be in the middle of it. It is not so if the look shows less than
// waits, or shows no more than the look before.
func (s *stream) grows(seen int) bool {
	if waitingIn(s.fifo) > seen || s.cut == seen {
		s.cut = 0
		return false
	}
	s.cut = seen
	return true
}

// stepSpill moves one frame that cannot be seen as a whole, by way of the spill. The lock is held.
func (s *stream) stepSpill(b *scratch) (int, error) {
	err := s.spill.fill(s.fifo)
	if errors.Is(err, errMalformed) {
		s.losses.add(1, reasonMalformed, err)
		return 0, s.spill.clear()
	}
	if err != nil {
		return 0, err
	}

	text, err := s.spill.read(b.in)
	if err != nil {
		return 0, err
	}
	if used, err := s.render(b, text); used == 0 {
		s.losses.add(1, reasonMalformed, err)
		return len(text), s.spill.clear()
	}
	s.d.metrics.spilled.Inc()
	held, late := s.put(b, 0)
	if held != nil {
		return 0, held
	}
	if late { // discard has cleared it
		return len(text), nil
	}
	return len(text), s.spill.clear()
}

// put writes a batch that is used bytes long in the FIFO. With held nothing is written, and the
// batch must not be consumed: the log cannot be opened for want of descriptors. The lock is held.
func (s *stream) put(b *scratch, used int) (held error, late bool) {
	late = s.guard(used, func() { held = s.write(b) })
	s.changed.tell()
	if late {
		return nil, true
	}
	return held, false
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

// malformedIn is the length of a message that cannot be understood at the beginning of b: all of b if
// its length cannot be one of Docker's.
func malformedIn(b []byte) int {
	if _, n, _ := next(b); n > 0 {
		return n
	}
	return len(b)
}

// write writes a batch to the log. What the disk does not take is dropped, so that the container can
// go on. If there is no descriptor for the log, nothing is dropped and write returns why. The lock
// is held.
func (s *stream) write(b *scratch) (held error) {
	if err := s.ensureLog(); err != nil {
		if isShortage(err) {
			return err
		}
		s.losses.add(len(b.ends), reasonDisk, err)
		return nil
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
		return nil
	}
	if st, statErr := s.log.Stat(); n > end && statErr == nil {
		err = errors.Join(err, s.log.Truncate(st.Size()-int64(n-end))) // a torn line would spoil the next one
	}
	s.losses.add(len(b.ends)-whole, reasonDisk, err)
	return nil
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
	if s.spill.size > 0 {
		return s.skipSpill(b, written)
	}

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

// skipSpill clears the spill if its frame stands at the end of a log already. What waits in the FIFO
// comes behind it, so nothing of that has been written.
func (s *stream) skipSpill(b *scratch, written []byte) error {
	text, err := s.spill.read(b.in)
	if err != nil {
		return err
	}
	if _, _ = s.render(b, text); alreadyWritten(b, written) == 0 {
		return nil
	}
	return s.spill.clear()
}

// growFIFO asks for the capacity that the FIFO shall have, if it has not got it, at most every
// growEvery.
func (s *stream) growFIFO() {
	if s.size >= fifoSize || time.Since(s.grown) < growEvery {
		return
	}
	s.grown = time.Now()
	before := small(s.size)
	s.size = growPipe(s.fifo, fifoSize, s.d.cfg.pipeSize)
	s.d.alarms.add(alarmPipes, small(s.size)-before)
}
