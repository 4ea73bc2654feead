package stream

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/moby/spdystream/spdy"
)

// TestLargeDataFrames checks that large data frames are split, complete and in order, and that only
// the last part ends the stream.
func TestLargeDataFrames(t *testing.T) {
	var wire bytes.Buffer
	w, err := spdy.NewFramer(&wire, nil)
	if err != nil {
		t.Fatal(err)
	}

	var sent bytes.Buffer
	sizes := []int{1, 0, maxData, maxData + 1, 3 << 20}
	for i, size := range sizes {
		data := bytes.Repeat([]byte{byte('a' + i)}, size)
		sent.Write(data)
		frame := &spdy.DataFrame{StreamId: 5, Data: data}
		if i == len(sizes)-1 {
			frame.Flags = spdy.DataFlagFin
		}
		if err := w.WriteFrame(frame); err != nil {
			t.Fatal(err)
		}
	}

	if err := w.WriteFrame(&spdy.PingFrame{Id: 7}); err != nil {
		t.Fatal(err)
	}

	r, err := spdy.NewFramer(io.Discard, &frameReader{r: &wire})
	if err != nil {
		t.Fatal(err)
	}

	var got bytes.Buffer
	ended := false
	for {
		frame, err := r.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}

		if p, ok := frame.(*spdy.PingFrame); ok {
			if p.Id != 7 {
				t.Errorf("ping %d", p.Id)
			}
			break
		}

		d := frame.(*spdy.DataFrame)
		if len(d.Data) > maxData || d.StreamId != 5 || ended {
			t.Fatalf("frame of %d bytes for stream %d, after the end: %v", len(d.Data), d.StreamId, ended)
		}

		got.Write(d.Data)
		ended = d.Flags&spdy.DataFlagFin != 0
	}

	if !ended || !bytes.Equal(got.Bytes(), sent.Bytes()) {
		t.Errorf("received %d of %d bytes, end of stream: %v", got.Len(), sent.Len(), ended)
	}
}

// TestRejectedFrames checks that an unexpected frame ends the session before its payload is read.
func TestRejectedFrames(t *testing.T) {
	control := func(kind uint16, length uint32) []byte {
		b := binary.BigEndian.AppendUint32(nil, 0x80030000|uint32(kind))
		return binary.BigEndian.AppendUint32(b, length)
	}

	var headers bytes.Buffer
	w, err := spdy.NewFramer(&headers, nil)
	if err != nil {
		t.Fatal(err)
	}

	if err := w.WriteFrame(&spdy.HeadersFrame{StreamId: 1, Headers: http.Header{"X": {"y"}}}); err != nil {
		t.Fatal(err)
	}

	for name, test := range map[string]struct{ wire, want string }{
		"large":   {string(control(synStream, maxControl+1)), "the limit is"},
		"largest": {string(control(ping, lengthMask)), "the limit is"},
		"unknown": {string(control(77, 0)), "type 77"},
		"reply":   {string(control(2, 12)), "type 2"},
		"headers": {headers.String(), "type 8"},
	} {
		t.Run(name, func(t *testing.T) {
			rejected := false
			f := &frameReader{r: strings.NewReader(test.wire + strings.Repeat("x", 100)), reject: func() error {
				rejected = true
				return nil
			}}

			b, err := io.ReadAll(f)
			if len(b) > 0 || err == nil || !strings.Contains(err.Error(), test.want) || !rejected {
				t.Errorf("read %q, error %v, rejected %v", b, err, rejected)
			}
		})
	}
}

// countingConn counts writes.
type countingConn struct {
	net.Conn
	got    bytes.Buffer
	writes int
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.writes++
	return c.got.Write(p)
}

// TestFrameWriter checks that each frame is sent in one write, for any pieces written by the
// session, and without waiting for the next frame.
func TestFrameWriter(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	c := &countingConn{}
	w := &frameWriter{frameConn: &frameConn{Conn: c}}
	var want bytes.Buffer
	for frame := 1; frame <= 500; frame++ {
		n := []int{0, 1, 7, 300, chunkSize}[random.IntN(5)]
		b := append([]byte{0, 0, 0, 1, 0, byte(n >> 16), byte(n >> 8), byte(n)}, make([]byte, n)...)
		for i := range b[frameHeader:] {
			b[frameHeader+i] = byte(random.Uint32())
		}

		want.Write(b)
		for len(b) > 0 {
			k := 1 + random.IntN(min(len(b), 1<<(random.IntN(18))))
			if _, err := w.Write(b[:k]); err != nil {
				t.Fatal(err)
			}
			b = b[k:]
		}

		if c.writes != frame || !bytes.Equal(c.got.Bytes(), want.Bytes()) {
			t.Fatalf("frame %d: %d writes, %d of %d bytes", frame, c.writes, c.got.Len(), want.Len())
		}
	}
}

// TestChunkFrames checks that a chunk is sent in one write, as a frame of the protocol.
func TestChunkFrames(t *testing.T) {
	for _, n := range []int{1, 124, 125, 126, 1000, math.MaxUint16 - 1, math.MaxUint16, chunkSize} {
		c := &chunk{n: n}
		for i := range c.withHeader(0) {
			c.withHeader(0)[i] = byte(i % 251)
		}

		data := bytes.Clone(c.withHeader(0))

		sent := &countingConn{}
		if err := (spdyData{conn: &frameConn{Conn: sent}, id: 7}).writeChunk(c); err != nil {
			t.Fatal(err)
		}

		want := append([]byte{0, 0, 0, 7, 0, byte(n >> 16), byte(n >> 8), byte(n)}, data...)
		if sent.writes != 1 || !bytes.Equal(sent.got.Bytes(), want) {
			t.Errorf("SPDY, %d bytes: %d writes, % x…", n, sent.writes, sent.got.Bytes()[:frameHeader])
		}

		sent = &countingConn{}
		if err := (webSocketData{conn: &frameConn{Conn: sent}, channel: 1}).writeChunk(c); err != nil {
			t.Fatal(err)
		}

		want = []byte{finalBinary} // RFC 6455, 5.2
		switch {
		case n+1 <= 125:
			want = append(want, byte(n+1))
		case n+1 <= math.MaxUint16:
			want = binary.BigEndian.AppendUint16(append(want, 126), uint16(n+1))
		default:
			want = binary.BigEndian.AppendUint64(append(want, 127), uint64(n+1))
		}

		want = append(append(want, 1), data...)
		if sent.writes != 1 || !bytes.Equal(sent.got.Bytes(), want) {
			t.Errorf("WebSocket, %d bytes: %d writes, % x…", n, sent.writes, sent.got.Bytes()[:3])
		}
	}
}
