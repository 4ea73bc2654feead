package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
)

// The frames of SPDY/3.1: an 8-byte header, whose first bit marks control frames, and a payload of
// up to 16 MiB.
const (
	frameHeader = 8
	controlBit  = 0x80
	dataFin     = 0x01
	lengthMask  = 1<<24 - 1

	synStream = 1
	rstStream = 3
	settings  = 4
	ping      = 6
	goAway    = 7
	windowUp  = 9

	// maxData is the size of the data frames that the session gets. It queues up to 250 of them.
	maxData = 32 << 10
	// maxControl bounds control frames, of which Kubernetes' carry a few short headers.
	maxControl = 32 << 10
)

// frameReader passes on what a client of SPDY sends. It splits large data frames, which the session
// would hold in memory whole, and fails at frames that Kubernetes' clients never send and that
// would block the session: headers after the start of a stream, and answers to streams that we have
// not opened.
type frameReader struct {
	r       io.Reader
	refuse  func() error // ends the session, for a frame that is not permitted
	header  [frameHeader]byte
	unread  []byte // rest of header
	payload int    // bytes to pass on before the next header
	rest    int    // bytes of a split data frame that have no header yet
	id      uint32 // of that frame
	flags   byte
}

func (f *frameReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}

	for len(f.unread) == 0 && f.payload == 0 {
		if err := f.next(); err != nil {
			return 0, err
		}
	}

	if len(f.unread) > 0 {
		n := copy(p, f.unread)
		f.unread = f.unread[n:]
		return n, nil
	}

	n, err := f.r.Read(p[:min(len(p), f.payload)])
	f.payload -= n

	return n, err
}

// next prepares the next frame.
func (f *frameReader) next() error {
	if f.rest > 0 {
		f.writeData()
		return nil
	}

	if _, err := io.ReadFull(f.r, f.header[:]); err != nil {
		return err
	}

	length := int(binary.BigEndian.Uint32(f.header[4:]) & lengthMask)
	if f.header[0]&controlBit == 0 {
		f.id, f.flags, f.rest = binary.BigEndian.Uint32(f.header[:]), f.header[4], length
		f.writeData()
		return nil
	}

	switch kind := binary.BigEndian.Uint16(f.header[2:]); kind {
	case synStream, rstStream, settings, ping, goAway, windowUp:
		if length > maxControl {
			return errors.Join(fmt.Errorf("SPDY: a frame of type %d has %d bytes, the limit is %d", kind, length,
				maxControl), f.refuse())
		}
	default:
		return errors.Join(fmt.Errorf("SPDY: unexpected frame of type %d", kind), f.refuse())
	}

	f.unread, f.payload = f.header[:], length

	return nil
}

// writeData prepares the next part of a data frame. Only the last one ends the stream.
func (f *frameReader) writeData() {
	size, flags := f.rest, f.flags
	if size > maxData {
		size, flags = maxData, f.flags&^dataFin
	}

	f.rest -= size
	binary.BigEndian.PutUint32(f.header[:], f.id)
	binary.BigEndian.PutUint32(f.header[4:], uint32(flags)<<24|uint32(size))
	f.unread, f.payload = f.header[:], size
}

// frameConn is a connection to which whole frames are written, by a session and by streams of data
// beside it.
type frameConn struct {
	net.Conn
	mu sync.Mutex // held while frames are written
}

// Write implements net.Conn. It takes one or more whole frames.
func (c *frameConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Conn.Write(p)
}

// frameWriter is a connection that sends each frame of SPDY at once. The session writes a frame in
// pieces, each of which would be a packet.
type frameWriter struct {
	*frameConn
	pending []byte // of a frame that is not complete
	header  [frameHeader]byte
	read    int // bytes of the header that were written
	left    int // bytes of the payload that were not
}

// Write implements net.Conn. One writes at a time.
func (f *frameWriter) Write(p []byte) (int, error) {
	f.pending = append(f.pending, p...)
	if !f.isComplete(p) {
		return len(p), nil
	}

	_, err := f.frameConn.Write(f.pending)
	f.pending = f.pending[:0]
	if err != nil {
		return 0, err
	}

	return len(p), nil
}

// isComplete reports whether a frame ends with p.
func (f *frameWriter) isComplete(p []byte) bool {
	for len(p) > 0 {
		if f.read < frameHeader {
			n := copy(f.header[f.read:], p)
			p, f.read = p[n:], f.read+n
			if f.read == frameHeader {
				f.left = int(binary.BigEndian.Uint32(f.header[4:]) & lengthMask)
			}
		} else {
			n := min(len(p), f.left)
			p, f.left = p[n:], f.left-n
		}

		if f.read == frameHeader && f.left == 0 {
			f.read = 0
		}
	}

	return f.read == 0
}

// chunkWriter writes a chunk as one frame, without a copy: the header goes into the room before the
// data.
type chunkWriter interface {
	io.Writer
	writeChunk(c *chunk) error
}

// spdyData writes to a stream of SPDY beside its session, which needs three writes and the wake-up
// of a goroutine for each frame.
type spdyData struct {
	io.Writer // of the session
	conn      *frameConn
	id        uint32
}

func (d spdyData) writeChunk(c *chunk) error {
	header := c.room(frameHeader)
	binary.BigEndian.PutUint32(header, d.id)
	binary.BigEndian.PutUint32(header[4:], uint32(c.n))
	_, err := d.conn.Write(c.withRoom(frameHeader))
	return err
}

// The header of a binary message of WebSocket, unmasked and in one frame (RFC 6455, 5.2).
const (
	finalBinary = 0x82
	length16    = 126 // the length is in the next two bytes
	length64    = 127 // the length is in the next eight bytes
)

// webSocketData writes to a channel of a WebSocket beside its session, which copies the data twice.
type webSocketData struct {
	io.Writer // of the session
	conn      *frameConn
	channel   byte
}

func (d webSocketData) writeChunk(c *chunk) error {
	length := c.n + 1 // with the channel
	size := 2
	switch {
	case length > math.MaxUint16:
		size += 8
		binary.BigEndian.PutUint64(c.room(size + 1)[2:], uint64(length))
		c.room(size + 1)[1] = length64

	case length >= length16:
		size += 2
		binary.BigEndian.PutUint16(c.room(size + 1)[2:], uint16(length))
		c.room(size + 1)[1] = length16

	default:
		c.room(size + 1)[1] = byte(length)
	}

	header := c.room(size + 1)
	header[0], header[size] = finalBinary, d.channel
	_, err := d.conn.Write(c.withRoom(size + 1))

	return err
}
