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

// Frames of SPDY/3.1 have an 8-byte header and a payload of up to 16 MiB. The first bit marks
// control frames.
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

	// maxData bounds the data frames passed to the session, which queues up to 250 of them.
	maxData = 32 << 10
	// maxControl bounds control frames. Kubernetes clients send a few short headers in them.
	maxControl = 32 << 10
)

// frameReader filters the frames of a SPDY client. It splits large data frames, because the session
// would buffer them completely. It rejects frames that would block the session and are never sent
// by Kubernetes clients: headers after the start of a stream, and replies to streams not opened by
// the server.
type frameReader struct {
	r         io.Reader
	reject    func() error // ends the session after an invalid frame
	header    [frameHeader]byte
	unread    []byte // unread part of header
	payload   int    // bytes before the next header
	remaining int    // bytes of a split data frame without a header so far
	id        uint32 // stream ID of that frame
	flags     byte
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
	if f.remaining > 0 {
		f.writeData()
		return nil
	}

	if _, err := io.ReadFull(f.r, f.header[:]); err != nil {
		return err
	}

	length := int(binary.BigEndian.Uint32(f.header[4:]) & lengthMask)
	if f.header[0]&controlBit == 0 {
		f.id, f.flags, f.remaining = binary.BigEndian.Uint32(f.header[:]), f.header[4], length
		f.writeData()
		return nil
	}

	switch kind := binary.BigEndian.Uint16(f.header[2:]); kind {
	case synStream, rstStream, settings, ping, goAway, windowUp:
		if length > maxControl {
			return errors.Join(fmt.Errorf("SPDY: frame of type %d has %d bytes, the limit is %d", kind, length,
				maxControl), f.reject())
		}
	default:
		return errors.Join(fmt.Errorf("SPDY: unexpected frame of type %d", kind), f.reject())
	}

	f.unread, f.payload = f.header[:], length

	return nil
}

// writeData prepares the next part of a data frame. Only the last one ends the stream.
func (f *frameReader) writeData() {
	size, flags := f.remaining, f.flags
	if size > maxData {
		size, flags = maxData, f.flags&^dataFin
	}

	f.remaining -= size
	binary.BigEndian.PutUint32(f.header[:], f.id)
	binary.BigEndian.PutUint32(f.header[4:], uint32(flags)<<24|uint32(size))
	f.unread, f.payload = f.header[:], size
}

// frameConn is a connection for complete frames. A session and its data streams write to it
// concurrently.
type frameConn struct {
	net.Conn
	mu sync.Mutex // serializes writes
}

// Write implements net.Conn. p must consist of complete frames.
func (c *frameConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Conn.Write(p)
}

// frameWriter is a connection that sends each SPDY frame in one write. The session writes frames in
// pieces, and each piece would become a packet.
type frameWriter struct {
	*frameConn
	pending   []byte // an incomplete frame
	header    [frameHeader]byte
	read      int // bytes of the header so far
	remaining int // missing bytes of the payload
}

// Write implements net.Conn. It is not safe for concurrent use.
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
				f.remaining = int(binary.BigEndian.Uint32(f.header[4:]) & lengthMask)
			}
		} else {
			n := min(len(p), f.remaining)
			p, f.remaining = p[n:], f.remaining-n
		}

		if f.read == frameHeader && f.remaining == 0 {
			f.read = 0
		}
	}

	return f.read == 0
}

// chunkWriter writes a chunk as one frame. It writes the header to the headroom of the chunk and
// does not copy the data.
type chunkWriter interface {
	io.Writer
	writeChunk(c *chunk) error
}

// spdyData writes to a SPDY stream and bypasses the session. The session would need three writes
// and wake up a goroutine for each frame.
type spdyData struct {
	io.Writer // of the session
	conn      *frameConn
	id        uint32
}

func (d spdyData) writeChunk(c *chunk) error {
	header := c.header(frameHeader)
	binary.BigEndian.PutUint32(header, d.id)
	binary.BigEndian.PutUint32(header[4:], uint32(c.n))
	_, err := d.conn.Write(c.withHeader(frameHeader))
	return err
}

// Header bytes of an unmasked binary WebSocket message in one frame (RFC 6455, 5.2).
const (
	finalBinary = 0x82
	length16    = 126 // the length is in the next two bytes
	length64    = 127 // the length is in the next eight bytes
)

// webSocketData writes to a channel of a WebSocket and bypasses the session, which would copy the
// data twice.
type webSocketData struct {
	io.Writer // of the session
	conn      *frameConn
	channel   byte
}

func (d webSocketData) writeChunk(c *chunk) error {
	length := c.n + 1 // including the channel number
	size := 2
	switch {
	case length > math.MaxUint16:
		size += 8
		binary.BigEndian.PutUint64(c.header(size + 1)[2:], uint64(length))
		c.header(size + 1)[1] = length64

	case length >= length16:
		size += 2
		binary.BigEndian.PutUint16(c.header(size + 1)[2:], uint16(length))
		c.header(size + 1)[1] = length16

	default:
		c.header(size + 1)[1] = byte(length)
	}

	header := c.header(size + 1)
	header[0], header[size] = finalBinary, d.channel
	_, err := d.conn.Write(c.withHeader(size + 1))

	return err
}
