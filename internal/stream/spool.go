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

// Bounds of output that clients have not read yet, in bytes.
const (
	chunkSize = 64 << 10
	// maxChunks bounds the memory of one output, in chunks. What is beyond goes to a file.
	maxChunks = 4
	// maxSpill bounds the file of one output.
	maxSpill = 64 << 20
	// maxMemory and maxDisk bound the memory and the files of all outputs.
	maxMemory = 32 << 20
	maxDisk   = 1 << 30
)

// errBehind ends a session whose client does not read.
var errBehind = fmt.Errorf("the client was cut off since it does not read and there is no room for more output (up "+
	"to %d MiB); "+
	"read faster, or write the output to a file: %w", maxSpill>>20, errdefs.ErrResourceExhausted)

// spools are what the outputs of all sessions share.
type spools struct {
	openFile func() (*os.File, error) // a file without a name; nil for none
	memory   budget
	disk     budget
}

func newSpools(openFile func() (*os.File, error)) *spools {
	if openFile == nil {
		openFile = func() (*os.File, error) { return nil, errors.ErrUnsupported }
	}
	s := &spools{openFile: openFile}
	s.memory.give(maxMemory)
	s.disk.give(maxDisk)
	return s
}

// budget is a number of bytes.
type budget struct{ left atomic.Int64 }

// take takes n bytes for an output that has as many as mine. An output gets no more than it leaves
// to the others, so that a few clients never use everything up. With force it gets them in any
// case.
func (b *budget) take(n, mine int64, force bool) bool {
	for {
		left := b.left.Load()
		if !force && left-n < mine+n {
			return false
		}
		if b.left.CompareAndSwap(left, left-n) {
			return true
		}
	}
}

func (b *budget) give(n int64) { b.left.Add(n) }

// headroom has room for the header of a frame.
const headroom = 16

// chunk is a piece of output in memory, with room for the header of a frame before it.
type chunk struct {
	n   int
	buf [headroom + chunkSize]byte
}

// space is where data goes, of which n bytes are used.
func (c *chunk) space() []byte { return c.buf[headroom:] }

// room are the last n bytes before the data.
func (c *chunk) room(n int) []byte { return c.buf[headroom-n : headroom] }

// withRoom are the last n bytes before the data, and the data.
func (c *chunk) withRoom(n int) []byte { return c.buf[headroom-n : headroom+c.n] }

var chunkPool = sync.Pool{New: func() any { return new(chunk) }}

// output takes the output of one stream as fast as it comes, into memory and then into a file, and
// sends it to the client. It has one writer.
type output struct {
	to      io.Writer
	session *outputs
	more    chan struct{} // of 1: there is something to send
	room    chan struct{} // of 1: there may be room

	mu       sync.Mutex // guards the rest
	chunks   []*chunk   // oldest first; all are older than what the file has
	file     *os.File   // used as a ring of spillSize bytes
	size     int64      // of the file
	sent     int64      // bytes that were read from the file
	spilled  int64      // bytes that were written to it
	complete bool       // nothing more comes
	err      error      // nothing more is sent or taken
}

// spillSize is the size of the ring. It has room for what comes after the end of the command.
const spillSize = maxSpill + engine.MaxRest

// Write takes output. It blocks as the session permits when there is no room.
func (o *output) Write(p []byte) (n int, err error) {
	for n < len(p) {
		taken, err := o.put(p[n:])
		n += taken
		if err == nil && taken == 0 {
			err = o.session.awaitRoom(o)
		}

		if err != nil {
			return n, err
		}
	}

	return n, nil
}

// put takes as much of p as there is room for.
func (o *output) put(p []byte) (int, error) {
	ended := o.session.ended.Load()
	o.mu.Lock()
	if o.err != nil {
		defer o.mu.Unlock()
		return 0, o.err
	}

	if o.spilled == o.sent {
		o.spilled, o.sent = 0, 0 // the file is used from its beginning
		if n := o.putMemoryLocked(p, ended); n > 0 {
			o.mu.Unlock()
			signal(o.more)
			return n, nil
		}
	}

	limit := maxSpill - (o.spilled - o.sent)
	if ended {
		limit += engine.MaxRest
	}

	at := o.spilled % spillSize
	n := max(0, min(int64(len(p)), limit, spillSize-at))
	grown := max(0, at+n-o.size)
	if n == 0 || !o.session.spools.disk.take(grown, o.size, ended) {
		o.mu.Unlock()
		return 0, nil
	}

	o.size += grown
	file := o.file
	o.mu.Unlock()

	return o.spill(file, p[:n], at)
}

// putMemoryLocked takes as much as fits into the last chunk, or a new one. After the end of the
// command the rest fits in any case.
func (o *output) putMemoryLocked(p []byte, ended bool) int {
	most := maxChunks
	if ended {
		most += engine.MaxRest / chunkSize
	}

	last := len(o.chunks) - 1
	if last < 0 || o.chunks[last].n == chunkSize {
		if len(o.chunks) >= most || !o.session.spools.memory.take(chunkSize, int64(len(o.chunks))*chunkSize,
			len(o.chunks) == 0 || ended) {
			return 0
		}

		c := chunkPool.Get().(*chunk)
		c.n = 0
		o.chunks = append(o.chunks, c)
		last++
	}

	c := o.chunks[last]
	n := copy(c.space()[c.n:], p)
	c.n += n

	return n
}

// spill writes p to the file. A file that cannot be written, for instance since the disk is full,
// has no room.
func (o *output) spill(file *os.File, p []byte, at int64) (n int, err error) {
	if file == nil {
		file, err = o.session.spools.openFile()
	}
	if err == nil {
		n, err = file.WriteAt(p, at)
	}

	if err != nil {
		o.session.log.Debug("output that a client has not read cannot be kept in a file", "err", err)
	}

	o.mu.Lock()
	defer o.mu.Unlock()

	o.file = file
	o.spilled += int64(n)
	if o.err != nil { // the client is gone meanwhile
		o.dropLocked()
		return 0, o.err
	}

	signal(o.more)

	return n, nil
}

// pump sends output until there is no more, or the client takes none.
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
			o.session.spools.memory.give(chunkSize)
			signal(o.room)
		}

		if err != nil {
			o.fail(err)
			return
		}
	}
}

// sendChunk writes a chunk.
func sendChunk(to io.Writer, c *chunk) error {
	if w, ok := to.(chunkWriter); ok {
		return w.writeChunk(c)
	}
	_, err := to.Write(c.withRoom(0))
	return err
}

// next waits for output and returns the oldest, nil at the end.
func (o *output) next() (*chunk, error) {
	for {
		o.mu.Lock()
		switch {
		case o.err != nil:
			defer o.mu.Unlock()
			return nil, o.err
		case len(o.chunks) > 0:
			c := o.chunks[0]
			o.chunks = o.chunks[1:]
			o.mu.Unlock()
			return c, nil

		case o.spilled > o.sent:
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

// unspill reads the oldest output of the file.
func (o *output) unspill() (*chunk, error) {
	o.mu.Lock()
	file, at := o.file, o.sent%spillSize
	n := min(o.spilled-o.sent, spillSize-at, chunkSize)
	o.mu.Unlock()

	o.session.spools.memory.take(chunkSize, 0, true)
	c := chunkPool.Get().(*chunk)
	c.n = int(n)
	_, err := file.ReadAt(c.space()[:n], at)

	o.mu.Lock()
	defer o.mu.Unlock()

	if o.err == nil { // else everything was given back
		o.sent += n
	}

	return c, err
}

// finish says that nothing more comes.
func (o *output) finish() {
	o.mu.Lock()
	o.complete = true
	o.mu.Unlock()
	signal(o.more)
}

// fail drops what was not sent. The first reason holds.
func (o *output) fail(err error) {
	o.mu.Lock()
	if o.err == nil {
		o.err = err
	}

	o.dropLocked()
	o.mu.Unlock()
	signal(o.more)
	signal(o.room)
}

func (o *output) dropLocked() {
	for _, c := range o.chunks {
		chunkPool.Put(c)
		o.session.spools.memory.give(chunkSize)
	}

	o.chunks = nil
	o.session.spools.disk.give(o.size)
	o.size, o.sent = 0, o.spilled
	if o.file != nil {
		_ = o.file.Close() // it has no name: nothing is left
		o.file = nil
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
