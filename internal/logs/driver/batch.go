package driver

import (
	"bytes"
	"errors"
)

// drainLocked moves all pending output.
func (s *stream) drainLocked() {
	for retried := false; !s.closed; {
		_, err := s.moveLocked()
		if errors.Is(err, errIncomplete) && !retried { // the next call moves a frame that does not grow
			retried = true
			continue
		}

		if err != nil {
			return
		}

		retried = false
	}
}

// moveLocked moves one batch from the FIFO to the log. It returns the batch's size in the FIFO in
// bytes.
func (s *stream) moveLocked() (int, error) {
	b, err := s.buffers.get()
	if err != nil {
		return 0, err
	}
	defer s.buffers.put(b)

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
		used = malformedSize(waiting)
		return used, b.consume(s.fifo, used)
	}

	if used == 0 {
		if s.isGrowingLocked(len(waiting)) {
			return 0, errIncomplete
		}
		return s.moveSpillLocked(b)
	}

	s.cut = 0
	late, held := s.putLocked(b, used)
	if held != nil {
		return 0, held
	}
	if late {
		return used, nil
	}

	return used, b.consume(s.fifo, used)
}

// measureLocked updates the size of a peek. It also tries to grow a small FIFO and small buffers
// from time to time.
func (s *stream) measureLocked(b *scratch) {
	s.buffers.grow(b)
	s.growFIFOLocked()
	s.window = min(b.size, s.size)
}

// isGrowingLocked reports whether a later peek may show a complete frame, after this one has shown
// its first bytes: the writer may be in the middle of it. It may not if the peek shows less than is
// pending, or no more than the previous peek.
func (s *stream) isGrowingLocked(shown int) bool {
	if pendingBytes(s.fifo) > shown || s.cut == shown {
		s.cut = 0
		return false
	}
	s.cut = shown
	return true
}

// moveSpillLocked moves one frame too large for a peek through the spill.
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
	late, held := s.putLocked(b, 0)
	if held != nil {
		return 0, held
	}
	if late { // discardUntil has cleared it
		return len(text), nil
	}

	return len(text), s.spill.clear()
}

// putLocked writes a batch of used bytes in the FIFO. If held is not nil, nothing is written and
// the batch must not be consumed, because there is no descriptor for the log.
func (s *stream) putLocked(b *scratch, used int) (late bool, held error) {
	late = s.guardLocked(used, func() { held = s.writeLocked(b) })
	s.changed.notify()
	if late {
		return true, nil
	}
	return false, held
}

// guardLocked runs do, an operation on the log of a batch of that many bytes. If do takes longer
// than stallLimit, the batch and all following output are discarded meanwhile, and late is true.
func (s *stream) guardLocked(batch int, do func()) (late bool) {
	return runGuarded(s.stallLimit, do, func(stop <-chan struct{}) { s.discardLocked(batch, stop) })
}

// writeLocked writes a batch to the log. It drops lines that do not fit on the disk, so that the
// container can continue. Without a descriptor for the log it drops nothing and returns the reason.
func (s *stream) writeLocked(b *scratch) (held error) {
	if err := s.ensureLogLocked(); err != nil {
		if isShortage(err) {
			return err
		}
		s.losses.add(len(b.ends), reasonDisk, err)
		return nil
	}

	n, err := s.log.Write(b.out)
	whole, end := b.countWhole(n)
	s.metrics.lines.Add(float64(whole))
	s.metrics.bytes.Add(float64(end))
	if err == nil {
		s.losses.end()
		return nil
	}

	if st, statErr := s.log.Stat(); n > end && statErr == nil {
		// A partial line would corrupt the next one.
		err = errors.Join(err, s.log.Truncate(st.Size()-int64(n-end)))
	}

	s.losses.add(len(b.ends)-whole, reasonDisk, err)

	return nil
}

// render converts all complete frames to lines of the log. It returns the length of these frames,
// and errMalformed at a malformed message.
func (b *scratch) render(c *clock, waiting []byte) (used int, err error) {
	b.out, b.ends = b.out[:0], b.ends[:0]
	for {
		f, n, err := nextFrame(waiting[used:])
		if err != nil {
			return used, err
		}
		used += n
		b.out = c.appendRecords(b.out, f)
		b.ends = append(b.ends, len(b.out))
	}
}

// countWhole returns the number of frames with all their lines in the first n bytes of out, and the
// length of these lines.
func (b *scratch) countWhole(n int) (frames, end int) {
	for frames < len(b.ends) && b.ends[frames] <= n {
		end = b.ends[frames]
		frames++
	}
	return frames, end
}

// countWritten returns the number of a batch's first frames already present at the end of a log.
// Their timestamps in nanoseconds make them unique.
func (b *scratch) countWritten(written []byte) int {
	for n := len(b.ends); n > 0; n-- {
		if bytes.HasSuffix(written, b.out[:b.ends[n-1]]) {
			return n
		}
	}
	return 0
}

// malformedSize returns the length of the malformed message at the beginning of b. This is all of b
// if the length is invalid.
func malformedSize(b []byte) int {
	if _, n, _ := nextFrame(b); n > 0 {
		return n
	}
	return len(b)
}

// framesSize returns the length of the first n frames.
func framesSize(b []byte, n int) (size int) {
	for range n {
		_, k, err := nextFrame(b[size:])
		if err != nil {
			return size
		}
		size += k
	}

	return size
}
