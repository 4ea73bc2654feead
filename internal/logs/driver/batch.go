package driver

import (
	"bytes"
	"errors"
)

// drainLocked moves all that waits.
func (s *stream) drainLocked() {
	for again := false; !s.closed; {
		_, err := s.moveLocked()
		if errors.Is(err, errCut) && !again { // the next batch takes a frame that does not grow
			again = true
			continue
		}

		if err != nil {
			return
		}

		again = false
	}
}

// moveLocked moves one batch from the FIFO to the log, and returns its size in the FIFO in bytes.
func (s *stream) moveLocked() (int, error) {
	b, err := s.buffers.take()
	if err != nil {
		return 0, err
	}
	defer s.buffers.give(b)

	s.measureLocked(b)
	if s.spill.size > 0 {
		return s.moveSpillLocked(b)
	}

	waiting, err := b.peek(s.fifo)
	if err != nil {
		return 0, err
	}

	used, err := b.render(&s.clock, waiting)
	if errors.Is(err, errMalformed) && used == 0 {
		s.losses.add(1, reasonMalformed, err)
		used = malformedIn(waiting)
		return used, b.consume(s.fifo, used)
	}

	if used == 0 {
		if s.isGrowingLocked(len(waiting)) {
			return 0, errCut
		}
		return s.moveSpillLocked(b)
	}

	s.cut = 0
	held, late := s.putLocked(b, used)
	if held != nil {
		return 0, held
	}
	if late {
		return used, nil
	}

	return used, b.consume(s.fifo, used)
}

// measureLocked notes how much a peek can show. A FIFO and buffers that are small are asked to grow
// from time to time.
func (s *stream) measureLocked(b *scratch) {
	s.buffers.grow(b)
	s.growFIFOLocked()
	s.window = min(b.size, s.size)
}

// isGrowingLocked reports whether the next peek may show a frame as a whole of which this one has
// shown only so many bytes: its writer may be in the middle of it. It is not so if the peek shows
// less than waits, or no more than the peek before.
func (s *stream) isGrowingLocked(shown int) bool {
	if waitingIn(s.fifo) > shown || s.cut == shown {
		s.cut = 0
		return false
	}
	s.cut = shown
	return true
}

// moveSpillLocked moves one frame that no peek can show as a whole, through the spill.
func (s *stream) moveSpillLocked(b *scratch) (int, error) {
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

	if used, err := b.render(&s.clock, text); used == 0 {
		s.losses.add(1, reasonMalformed, err)
		return len(text), s.spill.clear()
	}

	s.metrics.spilled.Inc()
	held, late := s.putLocked(b, 0)
	if held != nil {
		return 0, held
	}
	if late { // discard has cleared it
		return len(text), nil
	}

	return len(text), s.spill.clear()
}

// putLocked writes a batch that has used bytes in the FIFO. With held nothing is written, and the
// batch must not be consumed: the log cannot be opened for lack of descriptors.
func (s *stream) putLocked(b *scratch, used int) (held error, late bool) {
	late = s.guardLocked(used, func() { held = s.writeLocked(b) })
	s.changed.notify()
	if late {
		return nil, true
	}
	return held, false
}

// guardLocked does something with the log, for which a batch of that many bytes waits. If that
// takes longer than stallLimit, the batch and all that follows is discarded meanwhile, and late is
// true.
func (s *stream) guardLocked(batch int, do func()) (late bool) {
	return guarded(s.stallLimit, do, func(stop <-chan struct{}) { s.discardLocked(batch, stop) })
}

// writeLocked writes a batch to the log. Lines that the disk does not take are dropped, so that the
// container can go on. If there is no descriptor for the log, nothing is dropped and held is the
// reason.
func (s *stream) writeLocked(b *scratch) (held error) {
	if err := s.ensureLogLocked(); err != nil {
		if isShortage(err) {
			return err
		}
		s.losses.add(len(b.ends), reasonDisk, err)
		return nil
	}

	n, err := s.log.Write(b.out)
	whole, end := b.wholeLines(n)
	s.metrics.lines.Add(float64(whole))
	s.metrics.bytes.Add(float64(end))
	if err == nil {
		s.losses.over()
		return nil
	}

	if st, statErr := s.log.Stat(); n > end && statErr == nil {
		// A torn line would spoil the next one.
		err = errors.Join(err, s.log.Truncate(st.Size()-int64(n-end)))
	}

	s.losses.add(len(b.ends)-whole, reasonDisk, err)

	return nil
}

// render makes the log's lines of all whole frames. It returns the length of these frames, and
// errMalformed at a message that it does not understand.
func (b *scratch) render(c *clock, waiting []byte) (used int, err error) {
	b.out, b.ends = b.out[:0], b.ends[:0]
	for {
		f, n, err := next(waiting[used:])
		if err != nil {
			return used, err
		}
		used += n
		b.out = c.appendRecords(b.out, f)
		b.ends = append(b.ends, len(b.out))
	}
}

// wholeLines returns how many frames have all their lines in the first n bytes of out, and their
// length.
func (b *scratch) wholeLines(n int) (frames, end int) {
	for frames < len(b.ends) && b.ends[frames] <= n {
		end = b.ends[frames]
		frames++
	}
	return frames, end
}

// alreadyWritten returns how many of the first frames of a batch stand at the end of a log. Their
// times, in nanoseconds, make them unmistakable.
func (b *scratch) alreadyWritten(written []byte) int {
	for n := len(b.ends); n > 0; n-- {
		if bytes.HasSuffix(written, b.out[:b.ends[n-1]]) {
			return n
		}
	}
	return 0
}

// malformedIn returns the length of a message that cannot be understood at the beginning of b: all
// of b if its length cannot be one of Docker's.
func malformedIn(b []byte) int {
	if _, n, _ := next(b); n > 0 {
		return n
	}
	return len(b)
}

// framesIn returns the length of the first n frames.
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
