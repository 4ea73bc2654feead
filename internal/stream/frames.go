package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
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

// frameStream is a stream of a session. Its data bypasses the session.
type frameStream interface {
	io.Writer
	// writeChunk writes a chunk as one frame. It writes the header to the headroom of the chunk and
	// does not copy the data.
	writeChunk(c *chunk) error
	// tryWrite sends data as one frame without blocking. If the connection accepts only a part of
	// the frame, it keeps the rest for its next Write. If it accepts nothing, nothing is sent.
	tryWrite(data []byte) (sent, isPart bool, err error)
}

// spdyData writes to a SPDY stream and bypasses the session. The session would need three writes
// and wake up a goroutine for each frame.
type spdyData struct {
	io.Writer // of the session
	conn      *frameConn
	id        uint32
}

// putHeader implements framer.
func (d spdyData) putHeader(room []byte, n int) int {
	header := room[len(room)-frameHeader:]
	binary.BigEndian.PutUint32(header, d.id)
	binary.BigEndian.PutUint32(header[4:], uint32(n))
	return frameHeader
}

func (d spdyData) writeChunk(c *chunk) error { return d.conn.writeChunk(c, d) }

func (d spdyData) tryWrite(data []byte) (sent, isPart bool, err error) {
	return d.conn.tryWrite(data, d)
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

// putHeader implements framer. The channel number follows the header of the message.
func (d webSocketData) putHeader(room []byte, n int) int {
	length := n + 1 // including the channel number
	size := 2
	switch {
	case length > math.MaxUint16:
		size += 8
	case length >= length16:
		size += 2
	}

	header := room[len(room)-size-1:]
	switch size {
	case 2:
		header[1] = byte(length)
	case 4:
		header[1] = length16
		binary.BigEndian.PutUint16(header[2:], uint16(length))
	default:
		header[1] = length64
		binary.BigEndian.PutUint64(header[2:], uint64(length))
	}

	header[0], header[size] = finalBinary, d.channel

	return size + 1
}

func (d webSocketData) writeChunk(c *chunk) error { return d.conn.writeChunk(c, d) }

func (d webSocketData) tryWrite(data []byte) (sent, isPart bool, err error) {
	return d.conn.tryWrite(data, d)
}
