package stream

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
)

// spoolServer serves f, with files for what clients have not read.
func spoolServer(t *testing.T, f fake, stall time.Duration) *Server {
	t.Helper()
	dir := t.TempDir()
	s, err := New(Config{
		Runtime: f,
		Log:     discard,
		Spool: func() (*os.File, error) {
			file, err := os.CreateTemp(dir, "")
			if err == nil {
				err = os.Remove(file.Name())
			}
			return file, err
		},
	})
	if err != nil {
		t.Fatal(err)
	}

	s.stall = stall
	t.Cleanup(func() {
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			memory, disk := maxMemory-s.spools.memory.left.Load(), maxDisk-s.spools.disk.left.Load()
			if memory == 0 && disk == 0 {
				return
			} else if time.Now().After(end) {
				t.Fatalf("%d bytes of memory and %d of disk are not given back", memory, disk)
			}
		}
	})

	run(t, s)

	return s
}

// client is one that opens an exec or attach and reads when the test wants.
type client struct {
	name string
	open func(t *testing.T, raw string) (read func() (out, status string))
}

var clients = []client{
	{"WebSocket", func(t *testing.T, raw string) func() (string, string) {
		c := mustOpen(t, raw)
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		return func() (string, string) { got := drain(c); return got[1], got[3] }
	}},
	{"SPDY", func(t *testing.T, raw string) func() (string, string) {
		session, _ := dialSPDY(t, raw, "v4.channel.k8s.io")
		status := create(t, session, "streamType", "error")
		out := create(t, session, "streamType", "stdout")

		return func() (string, string) {
			text := make(chan string, 1)
			go func() { b, _ := io.ReadAll(out); text <- string(b) }()
			end, _ := io.ReadAll(status)
			return <-text, string(end)
		}
	}},
}

func outputURL(t *testing.T, s *Server, kind string) string {
	t.Helper()
	if kind == "exec" {
		r, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"cat"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		return r.Url
	}

	r, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}

	return r.Url
}

// TestClientThatDoesNotRead: its output is taken up to the bound. Then an attach ends at once and
// an exec when the client stays silent, and the client reads why.
func TestClientThatDoesNotRead(t *testing.T) {
	for _, kind := range []string{"exec", "attach"} {
		for _, c := range clients {
			t.Run(kind+" "+c.name, func(t *testing.T) {
				type result struct {
					written int64
					err     error
				}

				ended := make(chan result, 1)
				flood := func(x engine.Streams) error {
					n, err := io.Copy(x.Stdout, zeros{})
					ended <- result{n, err}
					return err
				}

				s := spoolServer(t, fake{
					exec: func(_ context.Context, _ string, x engine.Exec) (int, error) {
						return 0, flood(x.Streams)
					},
					attach: func(_ context.Context, _ string, x engine.Streams) error { return flood(x) },
				}, 100*time.Millisecond)

				read := c.open(t, outputURL(t, s, kind))
				select {
				case r := <-ended:
					if !errors.Is(r.err, errBehind) || r.written < maxSpill {
						t.Errorf("after %d bytes: %v", r.written, r.err)
					}
				case <-time.After(time.Minute):
					t.Fatal("the flood goes on")
				}

				_, end := read()
				if status, _, message := verdict(t, end); status != "Failure" || !strings.Contains(message, "cut off") {
					t.Errorf("status %q", end)
				}
			})
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestSlowClientGetsAll: output beyond every bound arrives whole while the client reads.
func TestSlowClientGetsAll(t *testing.T) {
	const size = maxSpill + 40<<20
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	want := sha256.Sum256(content)
	taken := make(chan struct{}, 1)
	s := spoolServer(t, fake{exec: func(_ context.Context, _ string, x engine.Exec) (int, error) {
		if _, err := x.Stdout.Write(content[:maxSpill]); err != nil {
			return 0, err
		}
		taken <- struct{}{}
		_, err := x.Stdout.Write(content[maxSpill:])
		return 0, err
	}}, time.Minute)

	c := mustOpen(t, outputURL(t, s, "exec"))
	<-taken // without a reader
	sum, status := sha256.New(), ""
	for {
		_, m, err := c.ReadMessage()
		if err != nil {
			break
		}

		if len(m) > 0 && m[0] == 1 {
			sum.Write(m[1:])
		} else if len(m) > 0 {
			status += string(m[1:])
		}
	}

	if got := sum.Sum(nil); !bytes.Equal(got, want[:]) || !strings.Contains(status, "Success") {
		t.Errorf("other output, status %q", status)
	}
}

// slowConn reads 200 kB a second for a while. The kernel lets the server write again only when a
// third of its buffer has gone, which takes longer than the test lets a client stall.
type slowConn struct {
	net.Conn
	until time.Time
}

func (c *slowConn) Read(p []byte) (int, error) {
	if time.Now().Before(c.until) {
		time.Sleep(20 * time.Millisecond)
		p = p[:min(len(p), 4<<10)]
	}
	return c.Conn.Read(p)
}

// TestVerySlowClientGoesOn: a client that takes some bytes all the time is not cut off, although
// there is no room for output in all that time.
func TestVerySlowClientGoesOn(t *testing.T) {
	const stall, slow = 2 * time.Second, 8 * time.Second
	content := make([]byte, maxSpill+8<<20)
	s := spoolServer(t, fake{exec: func(_ context.Context, _ string, x engine.Exec) (int, error) {
		_, err := x.Stdout.Write(content)
		return 0, err
	}}, stall)

	u, err := url.Parse(outputURL(t, s, "exec"))
	if err != nil {
		t.Fatal(err)
	}

	u.Scheme = "ws"
	dialer := websocket.Dialer{
		Subprotocols: []string{"v4.channel.k8s.io"},
		NetDialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, address)
			return &slowConn{c, time.Now().Add(slow)}, err
		},
	}

	c, _, err := dialer.DialContext(t.Context(), u.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	size, status := 0, ""
	for {
		_, m, err := c.ReadMessage()
		if err != nil {
			break
		}

		if len(m) > 0 && m[0] == 1 {
			size += len(m) - 1
		} else if len(m) > 0 {
			status += string(m[1:])
		}
	}

	if size != len(content) || !strings.Contains(status, "Success") {
		t.Errorf("%d bytes of %d, status %q", size, len(content), status)
	}
}

// TestRestAfterTheEnd: once a command has ended, the rest of its output finds room.
func TestRestAfterTheEnd(t *testing.T) {
	rest := make(chan error, 1)
	s := spoolServer(t, fake{exec: func(_ context.Context, _ string, x engine.Exec) (int, error) {
		full := make(chan struct{})
		go func() {
			defer close(full)
			_, _ = io.Copy(x.Stdout, zeros{}) // until the client is cut off
		}()

		time.AfterFunc(100*time.Millisecond, x.Ended)
		<-full
		_, err := x.Stdout.Write(nil)
		rest <- err

		return 0, nil
	}}, time.Hour)

	mustOpen(t, outputURL(t, s, "exec"))
	select {
	case <-rest: // there is room for a rest, not for more
	case <-time.After(time.Minute):
		t.Error("the writer waits after the end of the command")
	}
}

// TestOutputKeepsItsOrder: bytes come out as they went in, by memory and file, whatever the pieces.
func TestOutputKeepsItsOrder(t *testing.T) {
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 1))
		file, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}

		s := &Server{spools: newSpools(func() (*os.File, error) { return file, nil }), log: discard, stall: time.Minute}
		var got bytes.Buffer
		out := s.newOutputs(t.Context(), &conn{}, true)
		w := out.add(slowWriter{&got, rand.New(rand.NewPCG(seed, 2))})

		var want bytes.Buffer
		for range 300 {
			p := make([]byte, random.IntN(1<<(1+random.IntN(17))))
			for i := range p {
				p[i] = byte(random.Uint32())
			}

			want.Write(p)
			if _, err := w.Write(p); err != nil {
				t.Fatal(err)
			}
		}

		if err := out.flush(nil); err != nil || !bytes.Equal(got.Bytes(), want.Bytes()) {
			t.Fatalf("seed %d: %v, %d bytes of %d, or other ones", seed, err, got.Len(), want.Len())
		}

		out.drop()
		if left := s.spools.disk.left.Load(); left != maxDisk {
			t.Errorf("seed %d: %d bytes of disk are not given back", seed, maxDisk-left)
		}
	}
}

type slowWriter struct {
	io.Writer
	random *rand.Rand
}

func (w slowWriter) Write(p []byte) (int, error) {
	if w.random.IntN(4) == 0 {
		time.Sleep(time.Duration(w.random.IntN(500)) * time.Microsecond)
	}
	return w.Writer.Write(p)
}

// TestOtherSessionsGoOn: a client that does not read delays no other one.
func TestOtherSessionsGoOn(t *testing.T) {
	s := spoolServer(t, fake{exec: func(ctx context.Context, _ string, x engine.Exec) (int, error) {
		if x.Stdin == nil {
			_, err := io.Copy(x.Stdout, zeros{})
			return 0, err
		}
		_, err := io.Copy(x.Stdout, x.Stdin)
		return 0, err
	}}, time.Hour)

	for range 4 {
		mustOpen(t, outputURL(t, s, "exec"))
	}

	c := mustOpen(t, execURL(t, s, true))
	for range 100 {
		send(t, c, 0, "echo")
		if kind, m, err := c.ReadMessage(); err != nil || kind != websocket.BinaryMessage {
			t.Fatalf("%q, %v", m, err)
		}
	}
}

// TestManyClientsThatDoNotRead leave room for one more.
func TestManyClientsThatDoNotRead(t *testing.T) {
	var b budget
	b.give(maxDisk)
	const piece = 1 << 20
	held := make([]int64, 200)
	for range maxSpill / piece {
		for i := range held {
			if b.take(piece, held[i], false) {
				held[i] += piece
			}
		}
	}

	if left := b.left.Load(); left < 2*piece || !b.take(piece, 0, false) {
		t.Errorf("%d bytes are left", left)
	}
	if !b.take(maxDisk, 0, true) {
		t.Error("what must be taken is not")
	}
}
