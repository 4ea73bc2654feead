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

// spoolServer serves f, with files for unread output.
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
			memory := maxMemory - s.spools.memory.available.Load()
			disk := maxDisk - s.spools.disk.available.Load()
			if memory == 0 && disk == 0 {
				return
			} else if time.Now().After(end) {
				t.Fatalf("%d bytes of memory and %d bytes of disk are not released", memory, disk)
			}
		}
	})

	run(t, s)

	return s
}

// client opens an exec or attach. The test decides when it reads.
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

// TestClientDoesNotRead checks that output is buffered up to the limit. An attach then ends
// immediately, and an exec after the stall timeout. The client receives the reason.
func TestClientDoesNotRead(t *testing.T) {
	for _, kind := range []string{"exec", "attach"} {
		for _, c := range clients {
			t.Run(kind+" "+c.name, func(t *testing.T) {
				type result struct {
					written int64
					err     error
				}

				results := make(chan result, 1)
				flood := func(x engine.Streams) error {
					n, err := io.Copy(x.Stdout, zeros{})
					results <- result{n, err}
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
				case r := <-results:
					if !errors.Is(r.err, errClientTooSlow) || r.written < maxSpill {
						t.Errorf("after %d bytes: %v", r.written, r.err)
					}
				case <-time.After(time.Minute):
					t.Fatal("the session did not end within 1 min")
				}

				_, end := read()
				status, _, message := parseStatus(t, end)
				if status != "Failure" || !strings.Contains(message, "buffer is full") {
					t.Errorf("status %q", end)
				}
			})
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestSlowClientGetsAll checks that a reading client receives all output, even beyond the limits.
func TestSlowClientGetsAll(t *testing.T) {
	const size = maxSpill + 40<<20
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	want := sha256.Sum256(content)
	buffered := make(chan struct{}, 1)
	s := spoolServer(t, fake{exec: func(_ context.Context, _ string, x engine.Exec) (int, error) {
		if _, err := x.Stdout.Write(content[:maxSpill]); err != nil {
			return 0, err
		}
		buffered <- struct{}{}
		_, err := x.Stdout.Write(content[maxSpill:])
		return 0, err
	}}, time.Minute)

	c := mustOpen(t, outputURL(t, s, "exec"))
	<-buffered // while the client does not read
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
		t.Errorf("unexpected output, status %q", status)
	}
}

// slowConn reads 200 kB per second for a while. The kernel reports the socket of the server as
// writable only after a third of its buffer is free. This takes longer than the stall timeout of
// the test.
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

// TestVerySlowClient checks that a client is not disconnected while it keeps reading a few bytes,
// although the buffers are full all the time.
func TestVerySlowClient(t *testing.T) {
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
		t.Errorf("received %d of %d bytes, status %q", size, len(content), status)
	}
}

// TestOutputAfterExit checks that writers do not block after the exit of a command.
func TestOutputAfterExit(t *testing.T) {
	done := make(chan error, 1)
	s := spoolServer(t, fake{exec: func(_ context.Context, _ string, x engine.Exec) (int, error) {
		full := make(chan struct{})
		go func() {
			defer close(full)
			_, _ = io.Copy(x.Stdout, zeros{}) // until the client is disconnected
		}()

		time.AfterFunc(100*time.Millisecond, x.OnExit)
		<-full
		_, err := x.Stdout.Write(nil)
		done <- err

		return 0, nil
	}}, time.Hour)

	mustOpen(t, outputURL(t, s, "exec"))
	select {
	case <-done: // the extra space is limited
	case <-time.After(time.Minute):
		t.Error("the writer blocks after the exit of the command")
	}
}

// TestOutputOrder checks that output passes through memory and file unchanged, in pieces of any
// size.
func TestOutputOrder(t *testing.T) {
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
			t.Fatalf("seed %d: %v, sent %d of %d bytes, or different ones", seed, err, got.Len(), want.Len())
		}

		out.discard()
		if available := s.spools.disk.available.Load(); available != maxDisk {
			t.Errorf("seed %d: %d bytes of disk are not released", seed, maxDisk-available)
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

// TestOtherSessionsContinue checks that clients without reads do not delay others.
func TestOtherSessionsContinue(t *testing.T) {
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
			t.Fatalf("echo: %q, %v", m, err)
		}
	}
}

// TestBudget checks that many outputs leave space for one more.
func TestBudget(t *testing.T) {
	var b budget
	b.release(maxDisk)
	const piece = 1 << 20
	used := make([]int64, 200)
	for range maxSpill / piece {
		for i := range used {
			if b.reserve(piece, used[i], false) {
				used[i] += piece
			}
		}
	}

	if available := b.available.Load(); available < 2*piece || !b.reserve(piece, 0, false) {
		t.Errorf("%d bytes are available", available)
	}
	if !b.reserve(maxDisk, 0, true) {
		t.Error("a forced reservation failed")
	}
}
