package stream

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/engine"
)

// Bounds of unread output in bytes.
const (
	chunkSize = 64 << 10
	// maxChunks bounds the memory of one output, in chunks. Further output goes to a file.
	maxChunks = 4
	// maxSpill bounds the file of one output.
	maxSpill = 64 << 20
	// maxMemory and maxDisk bound the memory and the files of all outputs.
	maxMemory = 32 << 20
	maxDisk   = 1 << 30
)

// errClientTooSlow ends a session because the client does not read its output.
var errClientTooSlow = fmt.Errorf("session closed: the client does not read its output and the buffer is full (up to "+
	"%d MiB); read the output faster, or write it to a file: %w", maxSpill>>20, errdefs.ErrResourceExhausted)

// spools are the buffers shared by the outputs of all sessions.
type spools struct {
	openFile func() (*os.File, error) // opens an unnamed file
	memory   budget
	disk     budget
}

func newSpools(openFile func() (*os.File, error)) *spools {
	if openFile == nil {
		openFile = func() (*os.File, error) { return nil, errors.ErrUnsupported }
	}

	s := &spools{openFile: openFile}
	s.memory.release(maxMemory)
	s.disk.release(maxDisk)
	return s
}

// budget is a number of available bytes.
type budget struct{ available atomic.Int64 }

// reserve reserves n bytes for an output with the given number of bytes in use. An output must not
// use more than the remaining bytes for all others, so that a few clients cannot exhaust the
// budget. With force, reserve always succeeds.
func (b *budget) reserve(n, used int64, force bool) bool {
	for {
		available := b.available.Load()
		if !force && available-n < used+n {
			return false
		}
		if b.available.CompareAndSwap(available, available-n) {
			return true
		}
	}
}

func (b *budget) release(n int64) { b.available.Add(n) }

// headroom is the maximum size of a frame header.
const headroom = 16

// maxFrame bounds a frame sent without a buffer, in bytes. It is the size of the engine's reads:
// larger frames cost the client fewer wake-ups.
const maxFrame = 128 << 10

// chunk is a piece of output in memory, with headroom for a frame header.
type chunk struct {
	n   int // size of the data
	buf [headroom + chunkSize]byte
}

// data returns the buffer for data. The first n bytes are in use.
func (c *chunk) data() []byte { return c.buf[headroom:] }

// header returns the last n bytes of the headroom.
func (c *chunk) header(n int) []byte { return c.buf[headroom-n : headroom] }

// withHeader returns the data and the last n bytes of the headroom before it.
func (c *chunk) withHeader(n int) []byte { return c.buf[headroom-n : headroom+c.n] }

var chunkPool = sync.Pool{New: func() any { return new(chunk) }}

// output buffers one stream and sends it to the client. It buffers in memory first, and then in a
// file. It supports one writer.
type output struct {
	to      io.Writer
	session *outputs
	more    chan struct{} // capacity 1: there is data to send
	space   chan struct{} // capacity 1: there may be free space

	mu       sync.Mutex // guards the fields below
	sending  bool       // pump holds a chunk that may not have been sent
	chunks   []*chunk   // oldest first; all are older than the data in the file
	file     *os.File   // a ring buffer of spillSize bytes
	size     int64      // of the file
	sent     int64      // bytes read from the file
	spilled  int64      // bytes written to the file
	complete bool       // no more output follows
	err      error      // why no more output is accepted or sent
}

// spillSize is the size of the ring buffer. It includes space for the output after the exit of the
// command.
const spillSize = maxSpill + engine.MaxTrailingOutput

// Write implements io.Writer. When the buffers are full, it blocks or returns an error, depending
// on the session.
func (o *output) Write(p []byte) (n int, err error) {
	for n < len(p) {
		exited := o.session.exited.Load()
		accepted, err := o.put(p[n:], exited)
		n += accepted
		if err == nil && accepted == 0 {
			err = o.session.waitForSpace(o, exited)
		}

		if err != nil {
			return n, err
		}
	}

	return n, nil
}

// put sends or buffers as much of p as possible. After the exit of the command the limits include
// its remaining output.
func (o *output) put(p []byte, exited bool) (int, error) {
	o.mu.Lock()
	if o.err != nil {
		defer o.mu.Unlock()
		return 0, o.err
	}

	if o.spilled == o.sent {
		if !o.sending && len(o.chunks) == 0 {
			o.mu.Unlock()
			if n, err := o.sendNow(p); n > 0 || err != nil {
				return n, err
			}
			o.mu.Lock()
		}

		o.spilled, o.sent = 0, 0 // restart at the beginning of the file
		if n := o.putMemoryLocked(p, exited); n > 0 {
			o.mu.Unlock()
			signal(o.more)
			return n, nil
		}
	}

	limit := maxSpill - (o.spilled - o.sent)
	if exited {
		limit += engine.MaxTrailingOutput
	}

	offset := o.spilled % spillSize
	n := max(0, min(int64(len(p)), limit, spillSize-offset))
	growth := max(0, offset+n-o.size)
	if n == 0 || !o.session.spools.disk.reserve(growth, o.size, exited) {
		o.mu.Unlock()
		return 0, nil
	}

	o.size += growth
	file := o.file
	o.mu.Unlock()

	return o.spill(file, p[:n], offset)
}

// sendNow sends as much of p as the connection accepts without blocking, and does not wake up the
// pump. The caller is the only writer, and no other output is waiting. If only a part of a frame
// was sent, an empty chunk makes the pump send the rest.
func (o *output) sendNow(p []byte) (int, error) {
	to, ok := o.to.(frameStream)
	if !ok {
		return 0, nil
	}

	p = p[:min(len(p), maxFrame)]
	sent, isPart, err := to.tryWrite(p)
	if err != nil {
		o.fail(err)
		return 0, err
	}

	if isPart {
		o.mu.Lock()
		o.putMemoryLocked(nil, true)
		o.mu.Unlock()
		signal(o.more)
	}

	if !sent {
		return 0, nil
	}

	return len(p), nil
}

// putMemoryLocked buffers as much of p as fits into the last chunk or a new one. After the exit of
// the command, the limit includes the remaining output.
func (o *output) putMemoryLocked(p []byte, exited bool) int {
	limit := maxChunks
	if exited {
		limit += engine.MaxTrailingOutput / chunkSize
	}

	last := len(o.chunks) - 1
	if last < 0 || o.chunks[last].n == chunkSize {
		used, force := int64(len(o.chunks))*chunkSize, len(o.chunks) == 0 || exited
		if len(o.chunks) >= limit || !o.session.spools.memory.reserve(chunkSize, used, force) {
			return 0
		}

		c := chunkPool.Get().(*chunk)
		c.n = 0
		o.chunks = append(o.chunks, c)
		last++
	}

	c := o.chunks[last]
	n := copy(c.data()[c.n:], p)
	c.n += n

	return n
}

// spill writes p to the file. A failed write, for example because the disk is full, counts as a
// full buffer.
func (o *output) spill(file *os.File, p []byte, offset int64) (n int, err error) {
	if file == nil {
		file, err = o.session.spools.openFile()
	}
	if err == nil {
		n, err = file.WriteAt(p, offset)
	}

	if err != nil {
		o.session.log.Debug("failed to buffer unread output in a file", "err", err)
	}

	o.mu.Lock()
	defer o.mu.Unlock()

	o.file = file
	o.spilled += int64(n)
	if o.err != nil { // the client has disconnected in the meantime
		o.discardLocked()
		return 0, o.err
	}

	signal(o.more)

	return n, nil
}

// pump sends the buffered output until its end or an error.
func (o *output) pump() {
	for {
		c, err := o.next()
		if err == nil && c == nil {
			return
		}

		if err == nil {
			err = sendChunk(o.to, c)
		}

		if c != nil {
			chunkPool.Put(c)
			o.session.spools.memory.release(chunkSize)
			signal(o.space)
		}

		if err != nil {
			o.fail(err)
			return
		}
	}
}

// sendChunk writes a chunk to a stream.
func sendChunk(to io.Writer, c *chunk) error {
	if w, ok := to.(frameStream); ok {
		return w.writeChunk(c)
	}
	_, err := to.Write(c.withHeader(0))
	return err
}

// next waits for output and returns the oldest chunk, or nil at the end.
func (o *output) next() (*chunk, error) {
	for {
		o.mu.Lock()
		o.sending = false
		switch {
		case o.err != nil:
			defer o.mu.Unlock()
			return nil, o.err
		case len(o.chunks) > 0:
			c := o.chunks[0]
			o.chunks = o.chunks[1:]
			o.sending = true
			o.mu.Unlock()
			return c, nil

		case o.spilled > o.sent:
			o.sending = true
			o.mu.Unlock()
			return o.unspill()
		case o.complete:
			o.mu.Unlock()
			return nil, nil
		}

		o.mu.Unlock()
		<-o.more
	}
}

// unspill reads the oldest output from the file.
func (o *output) unspill() (*chunk, error) {
	o.mu.Lock()
	file, offset := o.file, o.sent%spillSize
	n := min(o.spilled-o.sent, spillSize-offset, chunkSize)
	o.mu.Unlock()

	o.session.spools.memory.reserve(chunkSize, 0, true)
	c := chunkPool.Get().(*chunk)
	c.n = int(n)
	_, err := file.ReadAt(c.data()[:n], offset)

	o.mu.Lock()
	defer o.mu.Unlock()

	if o.err == nil { // otherwise discardLocked has updated sent
		o.sent += n
	}

	return c, err
}

// finish marks the output as complete.
func (o *output) finish() {
	o.mu.Lock()
	o.complete = true
	o.mu.Unlock()
	signal(o.more)
}

// fail discards unsent output. Further writes return err, or the error of an earlier call.
func (o *output) fail(err error) {
	o.mu.Lock()
	if o.err == nil {
		o.err = err
	}

	o.discardLocked()
	o.mu.Unlock()
	signal(o.more)
	signal(o.space)
}

func (o *output) discardLocked() {
	for _, c := range o.chunks {
		chunkPool.Put(c)
		o.session.spools.memory.release(chunkSize)
	}

	o.chunks = nil
	o.session.spools.disk.release(o.size)
	o.size, o.sent = 0, o.spilled
	if o.file != nil {
		_ = o.file.Close() // also deletes the file, because it has no name
		o.file = nil
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
