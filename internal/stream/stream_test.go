package stream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gorilla/websocket"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
)

func TestMain(m *testing.M) {
	// The client's library waits a second when its connection has been closed before the session.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/moby/spdystream.(*Connection).shutdown"))
}

// fake is a Runtime of functions.
type fake struct {
	exec   func(ctx context.Context, id string, x engine.Exec) (int, error)
	attach func(ctx context.Context, id string, s engine.Streams) error
	netns  func(id string) (*os.File, error)
}

func (f fake) Exec(ctx context.Context, id string, x engine.Exec) (int, error) {
	return f.exec(ctx, id, x)
}
func (f fake) Attach(ctx context.Context, id string, s engine.Streams) error {
	return f.attach(ctx, id, s)
}
func (f fake) OpenNetNS(id string) (*os.File, error) { return f.netns(id) }

// host is the network namespace of a pod of the host's network.
func host(string) (*os.File, error) { return nil, nil }

type dialFunc = func(ctx context.Context, netns *os.File, addr netip.AddrPort) (net.Conn, error)

// dialHost dials in this namespace.
func dialHost(ctx context.Context, _ *os.File, addr netip.AddrPort) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", addr.String())
}

func start(t *testing.T, f fake, dial dialFunc) *Server {
	t.Helper()
	s, err := New(Config{Runtime: f, Dial: dial, Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	return s
}

var discard = slog.New(slog.DiscardHandler)

// run serves until the test ends.
func run(t *testing.T, s *Server) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- s.Serve() }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// open opens a streaming URL as a WebSocket.
func open(t testing.TB, raw string) (*websocket.Conn, *http.Response, error) {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "http" || u.Hostname() != "127.0.0.1" || u.Port() == "" || u.Port() == "0" {
		t.Fatalf("URL %q is not absolute, or not on loopback (%v)", raw, err)
	}

	u.Scheme = "ws"
	d := websocket.Dialer{Subprotocols: []string{"v4.channel.k8s.io"}, HandshakeTimeout: 10 * time.Second}
	c, resp, err := d.DialContext(t.Context(), u.String(), nil)
	if c != nil {
		t.Cleanup(func() { c.Close() })
		if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}

	return c, resp, err
}

func mustOpen(t testing.TB, raw string) *websocket.Conn {
	t.Helper()
	c, resp, err := open(t, raw)
	if err != nil {
		t.Fatalf("open %s: %v, %v", raw, err, resp)
	}
	return c
}

func send(t *testing.T, c *websocket.Conn, channel byte, data string) {
	t.Helper()
	if err := c.WriteMessage(websocket.BinaryMessage, append([]byte{channel}, data...)); err != nil {
		t.Fatal(err)
	}
}

// drain reads all channels until the end.
func drain(c *websocket.Conn) map[byte]string {
	got := map[byte]string{}
	for {
		_, m, err := c.ReadMessage()
		if err != nil {
			return got
		}
		if len(m) > 0 {
			got[m[0]] += string(m[1:])
		}
	}
}

// verdict is the status on the error channel.
func verdict(t *testing.T, text string) (status, exitCode, message string) {
	t.Helper()
	var v struct {
		Status, Message string
		Details         struct {
			Causes []struct{ Reason, Message string }
		}
	}

	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("status %q: %v", text, err)
	}

	for _, c := range v.Details.Causes {
		if c.Reason == "ExitCode" {
			exitCode = c.Message
		}
	}

	return v.Status, exitCode, v.Message
}

func TestExec(t *testing.T) {
	s := start(t, fake{exec: func(_ context.Context, id string, x engine.Exec) (int, error) {
		line := make([]byte, 6)
		if _, err := io.ReadFull(x.Stdin, line); err != nil {
			return 0, err
		}
		fmt.Fprintf(x.Stdout, "%s %q got %s", id, x.Cmd, line)
		fmt.Fprint(x.Stderr, "complaint")
		return 7, nil
	}}, nil)

	r, err := s.GetExec(&runtimeapi.ExecRequest{
		ContainerId: "c1",
		Cmd:         []string{"cat", "-"},
		Stdin:       true,
		Stdout:      true,
		Stderr:      true,
	})
	if err != nil {
		t.Fatal(err)
	}

	c := mustOpen(t, r.Url)
	send(t, c, 0, "hello\n")
	got := drain(c)
	if got[1] != "c1 [\"cat\" \"-\"] got hello\n" || got[2] != "complaint" {
		t.Errorf("streams %q", got)
	}
	if status, code, _ := verdict(t, got[3]); status != "Failure" || code != "7" {
		t.Errorf("status %q", got[3])
	}
	if _, resp, err := open(t, r.Url); err == nil || resp == nil || resp.StatusCode != http.StatusNotFound {
		t.Errorf("the URL works twice: %v, %v", resp, err)
	}
}

func TestExecEnds(t *testing.T) {
	for name, test := range map[string]struct {
		code          int
		err           error
		status, words string
	}{
		"well": {status: "Success"},
		"with error": {
			err:    fmt.Errorf("exec in container c1: %w", errdefs.ErrNotFound),
			status: "Failure",
			words:  "exec in container c1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, fake{exec: func(context.Context, string, engine.Exec) (int, error) {
				return test.code, test.err
			}}, nil)
			r, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"true"}, Stdout: true})
			if err != nil {
				t.Fatal(err)
			}

			got := drain(mustOpen(t, r.Url))
			if status, _, message := verdict(t, got[3]); status != test.status ||
				!strings.Contains(message, test.words) {
				t.Errorf("status %q", got[3])
			}
		})
	}
}

func TestTerminal(t *testing.T) {
	s := start(t, fake{exec: func(ctx context.Context, _ string, x engine.Exec) (int, error) {
		if !x.TTY || x.Stderr != nil {
			return 0, fmt.Errorf("TTY %v, stderr %v", x.TTY, x.Stderr)
		}
		size := <-x.Resize
		fmt.Fprintf(x.Stdout, "%dx%d", size.Width, size.Height)
		return 0, nil
	}}, nil)

	r, err := s.GetExec(&runtimeapi.ExecRequest{
		ContainerId: "c1",
		Cmd:         []string{"sh"},
		Stdin:       true,
		Stdout:      true,
		Tty:         true,
	})
	if err != nil {
		t.Fatal(err)
	}

	c := mustOpen(t, r.Url)
	send(t, c, 4, `{"Width":132,"Height":43}`)
	if got := drain(c); got[1] != "132x43" {
		t.Errorf("streams %q", got)
	}
}

// TestWatchingClosesNoStdin: over a WebSocket the library hands out a reader that ends at once,
// also to those who asked for none.
func TestWatchingClosesNoStdin(t *testing.T) {
	stdin := make(chan io.Reader, 2)
	s := start(t, fake{
		attach: func(_ context.Context, id string, x engine.Streams) error {
			stdin <- x.Stdin
			_, err := io.WriteString(x.Stdout, id)
			return err
		},
	}, nil)

	for _, want := range []bool{false, true} {
		r, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdin: want, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}

		if got := drain(mustOpen(t, r.Url)); got[1] != "c1" {
			t.Errorf("streams %q", got)
		}
		if got := <-stdin; (got != nil) != want {
			t.Errorf("stdin asked %v, got %v", want, got)
		}
	}
}

func TestClientGoes(t *testing.T) {
	entered, left := make(chan context.Context), make(chan struct{})
	s := start(t, fake{attach: func(ctx context.Context, _ string, _ engine.Streams) error {
		entered <- ctx
		<-ctx.Done()
		close(left)
		return ctx.Err()
	}}, nil)

	r, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}

	c := mustOpen(t, r.Url)
	<-entered
	c.Close()
	<-left
}

func TestCloseEndsStreams(t *testing.T) {
	entered := make(chan struct{})
	s := start(t, fake{attach: func(ctx context.Context, _ string, _ engine.Streams) error {
		close(entered)
		<-ctx.Done()
		return ctx.Err()
	}}, nil)

	r, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}

	c := mustOpen(t, r.Url)
	<-entered
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	drain(c)
}

func TestMalformedRequests(t *testing.T) {
	s := start(t, fake{}, nil)
	if _, err := s.GetExec(&runtimeapi.ExecRequest{Stdout: true}); err == nil {
		t.Error("exec without a container")
	}

	if _, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1"}); err == nil {
		t.Error("attach without streams")
	}

	if _, err := s.GetPortForward(&runtimeapi.PortForwardRequest{}); err == nil {
		t.Error("port-forward without a sandbox")
	}
}

// echo answers one connection with what it got in capitals, after the client has ended its side.
func echo(t *testing.T) (port int32) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	ended := make(chan struct{})
	go func() {
		defer close(ended)

		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()

		line := make([]byte, 5)
		if _, err := io.ReadFull(c, line); err == nil {
			io.WriteString(c, strings.ToUpper(string(line))) //nolint:errcheck // the test sees what is missing
		}
	}()

	t.Cleanup(func() { l.Close(); <-ended })

	return int32(l.Addr().(*net.TCPAddr).Port)
}

func TestPortForward(t *testing.T) {
	port := echo(t)
	netns := filepath.Join(t.TempDir(), "p1")
	if err := os.WriteFile(netns, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	var mu sync.Mutex
	var tried []string
	s := start(t, fake{netns: func(id string) (*os.File, error) {
		return os.Open(filepath.Join(filepath.Dir(netns), id))
	}},
		func(ctx context.Context, netns *os.File, addr netip.AddrPort) (net.Conn, error) {
			mu.Lock()
			tried = append(tried, filepath.Base(netns.Name())+" "+addr.Addr().String())
			mu.Unlock()
			if addr.Addr().Is4() {
				return nil, errors.New("refused")
			}
			return new(net.Dialer).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		})

	r, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p1", Port: []int32{port}})
	if err != nil {
		t.Fatal(err)
	}

	c := mustOpen(t, r.Url)
	send(t, c, 0, "hello")
	got := drain(c)
	if len(got[0]) < 2 || got[0][2:] != "HELLO" { // the first two bytes of each channel are the port
		t.Errorf("channels %q", got)
	}
	if want := "p1 127.0.0.1,p1 ::1"; strings.Join(tried, ",") != want {
		t.Errorf("dialled %q, want %q", tried, want)
	}
}

// TestPortForwardFamilies: a server on IPv6 is found although what comes over IPv4 is dropped.
func TestPortForwardFamilies(t *testing.T) {
	port := echo(t)
	s := start(t, fake{netns: host}, func(ctx context.Context, _ *os.File, addr netip.AddrPort) (net.Conn, error) {
		if addr.Addr().Is4() {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return new(net.Dialer).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	})

	c, err := s.dialLoopback(t.Context(), nil, 80)
	if err != nil {
		t.Fatal(err)
	}

	c.Close()
}

func TestPortForwardRefused(t *testing.T) {
	s := start(t, fake{netns: host}, func(context.Context, *os.File, netip.AddrPort) (net.Conn, error) {
		return nil, errors.New("nobody listens")
	})
	r, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p1", Port: []int32{1}})
	if err != nil {
		t.Fatal(err)
	}

	if got := drain(mustOpen(t, r.Url)); !strings.Contains(got[1], "nobody listens") {
		t.Errorf("channels %q", got)
	}
}

// TestHalfClose: what the client sends last still reaches the pod, and the pod's answer to the end
// comes back.
func TestHalfClose(t *testing.T) {
	ours, pods := tcpPair(t)
	client := &halfClient{Reader: strings.NewReader("question"), answer: &strings.Builder{}}
	done := make(chan error, 1)
	go func() {
		discarded, err := relay(t.Context(), client, client, ours)
		<-discarded
		done <- err
	}()

	asked, err := io.ReadAll(pods) // ends only with the half close
	if err != nil || string(asked) != "question" {
		t.Errorf("the pod got %q, %v", asked, err)
	}

	io.WriteString(pods, "answer") //nolint:errcheck // seen below
	pods.Close()
	if err := <-done; err != nil || client.answer.String() != "answer" {
		t.Errorf("the client got %q, %v", client.answer, err)
	}
}

// TestHalfClosedSilence: after the client has ended its side, the time counts from the pod's last
// byte.
func TestHalfClosedSilence(t *testing.T) {
	ours, pods := tcpPair(t)
	defer ours.Close()
	defer pods.Close()

	r := &silenceReader{Conn: ours, timeout: 300 * time.Millisecond}
	r.begin()
	go func() {
		for range 5 {
			time.Sleep(150 * time.Millisecond)
			_, _ = pods.Write([]byte("x"))
		}
	}()

	begin := time.Now()
	b, err := io.ReadAll(r)
	if string(b) != "xxxxx" || !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) < time.Second {
		t.Errorf("read %q, %v after %v", b, err, time.Since(begin))
	}
}

type halfClient struct {
	io.Reader
	answer *strings.Builder
}

func (c *halfClient) Write(p []byte) (int, error) { return c.answer.Write(p) }
func (*halfClient) Close() error                  { return nil }

func tcpPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}

	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}

	return a, b
}

func TestAddresses(t *testing.T) {
	for in, want := range map[string]string{
		"": "127.0.0.1:0", "10.0.0.1": "10.0.0.1:0", "10.0.0.1:99": "10.0.0.1:99", "::1": "[::1]:0", "[::1]": "[::1]:0",
		"[::1]:99": "[::1]:99",
		":99":      "127.0.0.1:99", "localhost": "localhost:0",
	} {
		if got := hostPort(in); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}

func TestURLOfAnUnspecifiedAddress(t *testing.T) {
	s, err := New(Config{Addr: "0.0.0.0", Runtime: fake{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()

	r, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"x"}, Stdout: true})
	if err != nil || !strings.HasPrefix(r.Url, "http://127.0.0.1:") {
		t.Errorf("%v, %v", r, err)
	}
}
