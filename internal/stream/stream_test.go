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
	// The client library waits a second if its connection is closed before the session.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/moby/spdystream.(*Connection).shutdown"))
}

// fake implements Runtime with functions.
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

// host returns the network namespace of a pod with the host's network.
func host(string) (*os.File, error) { return nil, nil }

type dialFunc = func(ctx context.Context, netns *os.File, addr netip.AddrPort) (net.Conn, error)

// dialHost dials in the current namespace.
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
		t.Fatalf("URL %q is not absolute or not on loopback (%v)", raw, err)
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

// drain reads all channels to the end.
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

// parseStatus parses the status on the error channel.
func parseStatus(t *testing.T, text string) (status, exitCode, message string) {
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
		fmt.Fprint(x.Stderr, "warning")
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
	if got[1] != "c1 [\"cat\" \"-\"] got hello\n" || got[2] != "warning" {
		t.Errorf("unexpected output %q", got)
	}
	if status, code, _ := parseStatus(t, got[3]); status != "Failure" || code != "7" {
		t.Errorf("status %q, want Failure with exit code 7", got[3])
	}
	if _, resp, err := open(t, r.Url); err == nil || resp == nil || resp.StatusCode != http.StatusNotFound {
		t.Errorf("second use of the URL: %v, %v; want 404", resp, err)
	}
}

func TestExecStatus(t *testing.T) {
	for name, test := range map[string]struct {
		code            int
		err             error
		status, message string
	}{
		"success": {status: "Success"},
		"error": {
			err:     fmt.Errorf("exec in container c1: %w", errdefs.ErrNotFound),
			status:  "Failure",
			message: "exec in container c1",
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
			if status, _, message := parseStatus(t, got[3]); status != test.status ||
				!strings.Contains(message, test.message) {
				t.Errorf("status %q, want %s: %s", got[3], test.status, test.message)
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
		t.Errorf("output %q, want 132x43", got[1])
	}
}

// TestAttachWithoutStdin checks that an attach without stdin does not close the stdin of the
// process. The WebSocket library returns an empty reader for a channel not requested.
func TestAttachWithoutStdin(t *testing.T) {
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
			t.Errorf("output %q, want c1", got[1])
		}
		if got := <-stdin; (got != nil) != want {
			t.Errorf("stdin requested: %v, got %v", want, got)
		}
	}
}

func TestClientDisconnects(t *testing.T) {
	started, ended := make(chan context.Context), make(chan struct{})
	s := start(t, fake{attach: func(ctx context.Context, _ string, _ engine.Streams) error {
		started <- ctx
		<-ctx.Done()
		close(ended)
		return ctx.Err()
	}}, nil)

	r, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}

	c := mustOpen(t, r.Url)
	<-started
	c.Close()
	<-ended
}

func TestCloseEndsStreams(t *testing.T) {
	started := make(chan struct{})
	s := start(t, fake{attach: func(ctx context.Context, _ string, _ engine.Streams) error {
		close(started)
		<-ctx.Done()
		return ctx.Err()
	}}, nil)

	r, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}

	c := mustOpen(t, r.Url)
	<-started
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	drain(c)
}

// echo serves one connection: it reads five bytes and returns them in upper case.
func echo(t *testing.T) (port int32) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	done := make(chan struct{})
	go func() {
		defer close(done)

		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()

		line := make([]byte, 5)
		if _, err := io.ReadFull(c, line); err == nil {
			io.WriteString(c, strings.ToUpper(string(line))) //nolint:errcheck // the test compares the output
		}
	}()

	t.Cleanup(func() { l.Close(); <-done })

	return int32(l.Addr().(*net.TCPAddr).Port)
}

func TestPortForward(t *testing.T) {
	port := echo(t)
	netns := filepath.Join(t.TempDir(), "p1")
	if err := os.WriteFile(netns, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	var mu sync.Mutex
	var dialed []string
	openNetNS := func(id string) (*os.File, error) { return os.Open(filepath.Join(filepath.Dir(netns), id)) }
	dial := func(ctx context.Context, netns *os.File, addr netip.AddrPort) (net.Conn, error) {
		mu.Lock()
		dialed = append(dialed, filepath.Base(netns.Name())+" "+addr.Addr().String())
		mu.Unlock()
		if addr.Addr().Is4() {
			return nil, errors.New("refused")
		}
		return new(net.Dialer).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	}
	s := start(t, fake{netns: openNetNS}, dial)

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
	if want := "p1 127.0.0.1,p1 ::1"; strings.Join(dialed, ",") != want {
		t.Errorf("dialed %q, want %q", dialed, want)
	}
}

// TestPortForwardFamilies checks that a server on IPv6 is reached although packets over IPv4 are
// dropped.
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
		return nil, errors.New("connection refused")
	})
	r, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p1", Port: []int32{1}})
	if err != nil {
		t.Fatal(err)
	}

	if got := drain(mustOpen(t, r.Url)); !strings.Contains(got[1], "connection refused") {
		t.Errorf("channels %q", got)
	}
}

// TestHalfClose checks that the last data of the client reaches the pod, and the response of the
// pod the client.
func TestHalfClose(t *testing.T) {
	server, pod := tcpPair(t)
	client := &halfClient{Reader: strings.NewReader("request"), response: &strings.Builder{}}
	done := make(chan error, 1)
	go func() {
		discarded, err := relay(t.Context(), client, client, server)
		<-discarded
		done <- err
	}()

	request, err := io.ReadAll(pod) // returns only after the half-close
	if err != nil || string(request) != "request" {
		t.Errorf("the pod received %q, %v", request, err)
	}

	io.WriteString(pod, "response") //nolint:errcheck // checked below
	pod.Close()
	if err := <-done; err != nil || client.response.String() != "response" {
		t.Errorf("the client received %q, %v", client.response, err)
	}
}

// TestHalfClosedSilence checks that the timeout restarts with each byte of the pod.
func TestHalfClosedSilence(t *testing.T) {
	server, pod := tcpPair(t)
	defer server.Close()
	defer pod.Close()

	r := &silenceReader{Conn: server, timeout: 300 * time.Millisecond}
	r.begin()
	go func() {
		for range 5 {
			time.Sleep(150 * time.Millisecond)
			_, _ = pod.Write([]byte("x"))
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
	response *strings.Builder
}

func (c *halfClient) Write(p []byte) (int, error) { return c.response.Write(p) }
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

func TestHostPort(t *testing.T) {
	for in, want := range map[string]string{
		"":            "127.0.0.1:0",
		"10.0.0.1":    "10.0.0.1:0",
		"10.0.0.1:99": "10.0.0.1:99",
		"::1":         "[::1]:0",
		"[::1]":       "[::1]:0",
		"[::1]:99":    "[::1]:99",
		":99":         "127.0.0.1:99",
		"localhost":   "localhost:0",
	} {
		t.Run(in, func(t *testing.T) {
			if got := hostPort(in); got != want {
				t.Errorf("hostPort(%q) = %q, want %q", in, got, want)
			}
		})
	}
}

func TestURLOfUnspecifiedAddress(t *testing.T) {
	s, err := New(Config{Addr: "0.0.0.0", Runtime: fake{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()

	r, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"x"}, Stdout: true})
	if err != nil || !strings.HasPrefix(r.Url, "http://127.0.0.1:") {
		t.Errorf("URL %v, error %v; want a URL on 127.0.0.1", r, err)
	}
}
