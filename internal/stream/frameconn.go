package stream

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// framer writes the frame headers of a stream.
type framer interface {
	// putHeader writes the header of a frame with n bytes of data to the end of room, a buffer of
	// headroom bytes. It returns the size of the header.
	putHeader(room []byte, n int) int
}

// frameConn is a connection for complete frames. A session and its data streams write to it
// concurrently.
type frameConn struct {
	net.Conn
	raw     syscall.RawConn // nil if writes always block, as with TLS
	traffic func(n int)     // see conn.recordTraffic

	mu   sync.Mutex // serializes writes
	rest []byte     // unsent bytes of the last frame
}

func newFrameConn(nc net.Conn) *frameConn {
	f := &frameConn{Conn: nc}
	c, ok := nc.(*conn)
	if !ok {
		return f
	}

	if t, ok := c.Conn.Conn.(*net.TCPConn); ok {
		if raw, err := t.SyscallConn(); err == nil {
			f.raw, f.traffic = raw, c.recordTraffic
		}
	}

	return f
}

// Write implements net.Conn. It sends the rest of the last frame first. p must consist of complete
// frames, or be empty.
func (c *frameConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()

	if len(c.rest) > 0 {
		rest := c.rest
		c.rest = nil
		if _, err := c.Conn.Write(rest); err != nil {
			return 0, err
		}
	}

	if len(p) == 0 {
		return 0, nil
	}

	return c.Conn.Write(p)
}

// writeChunk writes a chunk as one frame. For an empty chunk it only sends the rest of the last
// frame.
func (c *frameConn) writeChunk(data *chunk, f framer) error {
	var frame []byte
	if data.n > 0 {
		frame = data.withHeader(f.putHeader(data.header(headroom), data.n))
	}

	_, err := c.Write(frame)

	return err
}

// tryWrite sends data as one frame without blocking; see frameStream.tryWrite.
func (c *frameConn) tryWrite(data []byte, f framer) (sent, isPart bool, err error) {
	if c.raw == nil || !c.mu.TryLock() {
		return false, false, nil
	}
	defer c.mu.Unlock()

	if len(c.rest) > 0 {
		return false, false, nil
	}

	var room [headroom]byte
	header := room[headroom-f.putHeader(room[:], len(data)):]
	n, err := c.send(header, data)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false, false, nil
	case err != nil:
		return false, false, fmt.Errorf("write to the client: %w", err)
	}

	c.traffic(n)

	if n < len(header) {
		c.rest = append(c.rest, header[n:]...)
		n = len(header)
	}

	c.rest = append(c.rest, data[n-len(header):]...)

	return true, len(c.rest) > 0, nil
}

// send sends two buffers without blocking and returns the number of accepted bytes (sendmsg(2),
// MSG_DONTWAIT).
func (c *frameConn) send(header, data []byte) (n int, err error) {
	buffers := [][]byte{header, data}
	rawErr := c.raw.Write(func(fd uintptr) bool {
		n, err = unix.SendmsgBuffers(int(fd), buffers, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		return true
	})
	if err == nil && rawErr != nil {
		err = rawErr
	}

	return n, err
}
