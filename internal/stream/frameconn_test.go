package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"cri-dockerd/internal/connlimit"
)

// pipeOfTCP returns both ends of a TCP connection with small buffers, so that frames are often sent
// in part.
func pipeOfTCP(t *testing.T) (ours *conn, client net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })

	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })

	for _, c := range []net.Conn{client, server} {
		if err := c.(*net.TCPConn).SetWriteBuffer(64 << 10); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
			t.Fatal(err)
		}
	}

	return &conn{Conn: &connlimit.Conn{Conn: server}}, client
}

// TestFramesStayWhole has two outputs and a session write to one connection, whose client reads
// with pauses: no frame is torn by another, and each stream keeps its order.
func TestFramesStayWhole(t *testing.T) {
	const size = 1 << 20
	ours, client := pipeOfTCP(t)
	frames := newFrameConn(ours)
	if frames.raw == nil {
		t.Fatal("frames cannot be sent without blocking")
	}

	s := &outputs{
		ctx:    context.Background(),
		conn:   ours,
		spools: newSpools(nil),
		log:    discard,
		blocks: true,
		stall:  time.Minute,
	}
	const control = 9 // the ID of the session's own frames
	var writers sync.WaitGroup
	sent := map[uint32][]byte{control: bytes.Repeat([]byte("x"), 200)}
	for id := range uint32(2) {
		out := s.add(spdyData{conn: frames, id: id})
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(rand.Int())
		}

		sent[id] = data
		writers.Go(func() {
			for rest := data; len(rest) > 0; {
				n := min(len(rest), 1+rand.IntN(200<<10))
				if _, err := out.Write(rest[:n]); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				rest = rest[n:]
			}
		})
	}

	writers.Go(func() {
		for range 200 {
			frame := []byte{0, 0, 0, control, 0, 0, 0, 1, 'x'}
			if _, err := frames.Write(frame); err != nil {
				t.Errorf("write: %v", err)
			}
			time.Sleep(time.Millisecond)
		}
	})

	go func() {
		writers.Wait()
		_ = s.flush(nil)
		_ = ours.Conn.Conn.Close()
	}()

	got := readFrames(t, client)
	for id, want := range sent {
		if !bytes.Equal(got[id], want) {
			t.Errorf("stream %d: %d bytes arrived of %d, or not in order", id, len(got[id]), len(want))
		}
	}
}

// readFrames reads frames of SPDY data to their end, with pauses, and returns the data by stream.
func readFrames(t *testing.T, client net.Conn) map[uint32][]byte {
	t.Helper()
	got := map[uint32][]byte{}
	var header [frameHeader]byte
	for n := 0; ; n++ {
		_, err := io.ReadFull(client, header[:])
		if err == io.EOF { //nolint:errorlint // io.ReadFull's contract
			return got
		}

		id, length := binary.BigEndian.Uint32(header[:]), binary.BigEndian.Uint32(header[4:])
		data := make([]byte, min(length, 1<<20))
		if err == nil {
			_, err = io.ReadFull(client, data)
		}
		if err != nil || id > 9 || length > maxFrame {
			t.Errorf("a torn frame: stream %d, %d bytes, %v", id, length, err)
			return got
		}

		got[id] = append(got[id], data...)
		if n%64 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
}

// heldStream is a stream whose connection takes nothing at once, and whose frames wait for release.
type heldStream struct {
	io.Writer
	taken, release chan struct{}
	tries, sent    []byte
}

func (h *heldStream) writeChunk(c *chunk) error {
	h.taken <- struct{}{}
	<-h.release
	h.sent = append(h.sent, c.withHeader(0)...)
	return nil
}

func (h *heldStream) tryWrite(data []byte) (sent, isPart bool, err error) {
	h.tries = append(h.tries, data...)
	return false, false, nil
}

// TestNothingOvertakesAChunk has the pump hold a chunk: what is written meanwhile is not sent
// before it.
func TestNothingOvertakesAChunk(t *testing.T) {
	h := &heldStream{taken: make(chan struct{}), release: make(chan struct{})}
	s := &outputs{
		ctx:    t.Context(),
		conn:   &conn{},
		spools: newSpools(nil),
		log:    discard,
		blocks: true,
		stall:  time.Minute,
	}
	out := s.add(h)
	for _, piece := range []string{"a", "b"} {
		if _, err := io.WriteString(out, piece); err != nil {
			t.Fatal(err)
		}
		if piece == "a" {
			<-h.taken
		}
	}
	if string(h.tries) != "a" {
		t.Errorf("%q was tried, while the pump held a", h.tries)
	}

	h.release <- struct{}{}
	<-h.taken
	h.release <- struct{}{}
	if err := s.flush(nil); err != nil || string(h.sent) != "ab" {
		t.Errorf("%v, %q", err, h.sent)
	}
}

// TestExitAddsSpace lets the command exit after a write found no space. Its client stays connected.
func TestExitAddsSpace(t *testing.T) {
	for _, blocks := range []bool{true, false} {
		s := &outputs{ctx: t.Context(), conn: &conn{}, log: discard, blocks: blocks, stall: time.Minute}
		s.exited.Store(true)
		if err := s.waitForSpace(&output{session: s}, false); err != nil {
			t.Errorf("blocks %t: the client is disconnected although the exit added space: %v", blocks, err)
		}
	}
}
