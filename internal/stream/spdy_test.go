package stream

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"cri-dockerd/internal/engine"
)

// dialSPDY opens a streaming URL as the API server does. Tests use the raw connection for invalid
// input.
func dialSPDY(t *testing.T, raw, protocol string) (session httpstream.Connection, nc net.Conn) {
	t.Helper()
	nc = upgradeSPDY(t, raw, protocol)
	session, err := spdy.NewClientConnection(nc)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { session.Close() })

	return session, nc
}

// upgradeSPDY returns an upgraded connection before its first SPDY frame. Its deadline turns a hang
// into a failure of the test in question.
func upgradeSPDY(t testing.TB, raw, protocol string) net.Conn {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}

	nc, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}

	if u.Scheme == "https" {
		nc = tls.Client(nc, &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // a certificate of the test
	}

	fmt.Fprintf(nc, "POST %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"+
		"X-Stream-Protocol-Version: %s\r\n\r\n",
		u.RequestURI(), u.Host, protocol)
	resp, err := http.ReadResponse(bufio.NewReaderSize(oneByte{nc}, 16), nil)
	if err != nil {
		t.Fatal(err)
	}

	if resp.StatusCode != http.StatusSwitchingProtocols {
		b, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s: %s %s", raw, resp.Status, b)
	}

	return nc
}

// oneByte reads one byte at a time, so that a buffered reader does not read beyond the header of a
// response.
type oneByte struct{ io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.Reader.Read(p[:1]) }

func create(t *testing.T, session httpstream.Connection, headers ...string) httpstream.Stream {
	t.Helper()
	s, err := createStream(session, headers...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func createStream(session httpstream.Connection, headers ...string) (httpstream.Stream, error) {
	h := http.Header{}
	for i := 0; i+1 < len(headers); i += 2 {
		h.Set(headers[i], headers[i+1])
	}
	return session.CreateStream(h)
}

func execURL(t *testing.T, s *Server, stdin bool) string {
	t.Helper()
	r, err := s.GetExec(&runtimeapi.ExecRequest{
		ContainerId: "c1",
		Cmd:         []string{"cat"},
		Stdin:       stdin,
		Stdout:      true,
		Stderr:      true,
	})
	if err != nil {
		t.Fatal(err)
	}

	return r.Url
}

func forwardURL(t *testing.T, s *Server) string {
	t.Helper()
	r, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p1"})
	if err != nil {
		t.Fatal(err)
	}
	return r.Url
}

// cat is a runtime with commands that copy their input to their output and exit with code 7.
var cat = fake{
	exec: func(_ context.Context, _ string, x engine.Exec) (int, error) {
		if x.Stdin != nil {
			if _, err := io.Copy(x.Stdout, x.Stdin); err != nil {
				return 0, err
			}
		}
		_, err := io.WriteString(x.Stderr, "warning")
		return 7, err
	},
	netns: host,
}

// runSPDY runs a command as kubectl does, and returns its output and status.
func runSPDY(t *testing.T, raw, protocol, input string) (out, errOut, status string) {
	t.Helper()
	session, _ := dialSPDY(t, raw, protocol)
	errors := create(t, session, "streamType", "error")
	stdin := create(t, session, "streamType", "stdin")
	stdout := create(t, session, "streamType", "stdout")
	stderr := create(t, session, "streamType", "stderr")
	if _, err := io.WriteString(stdin, input); err != nil {
		t.Fatal(err)
	}

	stdin.Close()
	var texts [3]string
	var readers sync.WaitGroup
	for i, r := range []io.Reader{stdout, stderr, errors} {
		readers.Go(func() { b, _ := io.ReadAll(r); texts[i] = string(b) })
	}

	readers.Wait()

	return texts[0], texts[1], texts[2]
}

func TestSPDYExec(t *testing.T) {
	s := start(t, cat, nil)
	input := strings.Repeat("a line\n", 100_000) // in one frame
	for protocol, want := range map[string]string{
		"v4.channel.k8s.io": "7",
		"v2.channel.k8s.io": "",
		"channel.k8s.io":    "",
	} {
		t.Run(protocol, func(t *testing.T) {
			out, errOut, end := runSPDY(t, execURL(t, s, true), protocol, input)
			if out != input || errOut != "warning" {
				t.Errorf("%d bytes of output, want %d; stderr %q", len(out), len(input), errOut)
			}

			if want == "" {
				if !strings.Contains(end, "exit status 7") {
					t.Errorf("status %q, want exit status 7", end)
				}
				return
			}

			if status, code, _ := parseStatus(t, end); status != "Failure" || code != want {
				t.Errorf("status %q, want Failure with exit code %s", end, want)
			}
		})
	}
}

func TestSPDYTerminal(t *testing.T) {
	s := start(t, fake{exec: func(_ context.Context, _ string, x engine.Exec) (int, error) {
		size := <-x.Resize
		_, err := fmt.Fprintf(x.Stdout, "%dx%d", size.Width, size.Height)
		return 0, err
	}}, nil)

	r, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"sh"}, Stdout: true, Tty: true})
	if err != nil {
		t.Fatal(err)
	}

	session, _ := dialSPDY(t, r.Url, "v4.channel.k8s.io")
	create(t, session, "streamType", "error")
	stdout := create(t, session, "streamType", "stdout")
	resize := create(t, session, "streamType", "resize")
	if _, err := io.WriteString(resize, `{"Width":132,"Height":43}`); err != nil {
		t.Fatal(err)
	}

	if b, err := io.ReadAll(stdout); err != nil || string(b) != "132x43" {
		t.Errorf("read %q, %v", b, err)
	}
}

// connectTo opens the two streams of a connection to a port.
func connectTo(session httpstream.Connection, id, port int) (data, errs httpstream.Stream, err error) {
	headers := []string{"port", strconv.Itoa(port), "requestID", strconv.Itoa(id), "streamType"}
	if errs, err = createStream(session, append(headers, "error")...); err != nil {
		return nil, nil, err
	}
	data, err = createStream(session, append(headers, "data")...)
	return data, errs, err
}

// resetting starts a server that resets every connection.
func resetting(t *testing.T) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.ReadFull(c, make([]byte, 5))
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	}()

	return l.Addr().(*net.TCPAddr).Port
}

// TestSPDYPortForward checks that a failed connection sends nothing on its error stream, because
// clients would end the session. The other connections of the session continue.
func TestSPDYPortForward(t *testing.T) {
	s := start(t, fake{netns: host}, dialHost)
	session, _ := dialSPDY(t, forwardURL(t, s), "portforward.k8s.io")
	open, _, err := connectTo(session, 100, int(echo(t)))
	if err != nil {
		t.Fatal(err)
	}

	for id, port := range []int{1, resetting(t)} {
		data, errs, err := connectTo(session, 10+id, port)
		if err != nil {
			t.Fatal(err)
		}

		_, _ = io.WriteString(data, "hello")
		if text, _ := io.ReadAll(errs); len(text) > 0 {
			t.Errorf("port %d: error %q", port, text)
		}
		if b, _ := io.ReadAll(data); len(b) > 0 {
			t.Errorf("port %d: data %q", port, b)
		}
	}

	if _, err := io.WriteString(open, "hello"); err != nil {
		t.Fatal(err)
	}

	if b, err := io.ReadAll(open); err != nil || string(b) != "HELLO" {
		t.Errorf("open connection: %q, %v", b, err)
	}

	for id := 1; id <= 3; id++ {
		data, errs, err := connectTo(session, id, int(echo(t)))
		if err != nil {
			t.Fatal(err)
		}

		errs.Close()
		if _, err := io.WriteString(data, "hello"); err != nil {
			t.Fatal(err)
		}

		if b, err := io.ReadAll(data); err != nil || string(b) != "HELLO" {
			t.Errorf("connection %d: %q, %v", id, b, err)
		}

		data.Close()
	}

	eventually(t, "all slots are free", func() bool { return s.forwards.slots() == 0 })
}

// TestPortForwardEndsWithPod tests both protocols.
func TestPortForwardEndsWithPod(t *testing.T) {
	var stopped atomic.Bool
	s, err := New(Config{
		Dial: dialHost,
		Log:  discard,
		Runtime: fake{netns: func(id string) (*os.File, error) {
			if stopped.Load() {
				return nil, fmt.Errorf("sandbox %s is not ready: %w", id, errdefs.ErrFailedPrecondition)
			}
			return nil, nil
		}},
	})
	if err != nil {
		t.Fatal(err)
	}

	s.podInterval = 10 * time.Millisecond
	run(t, s)
	session, _ := dialSPDY(t, forwardURL(t, s), "portforward.k8s.io")
	r, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p1", Port: []int32{int32(echo(t))}})
	if err != nil {
		t.Fatal(err)
	}

	socket := mustOpen(t, r.Url)
	data, _, err := connectTo(session, 0, int(echo(t)))
	if err != nil {
		t.Fatal(err)
	}

	if _, err := io.WriteString(data, "hello"); err != nil {
		t.Fatal(err)
	}

	if b, _ := io.ReadAll(data); string(b) != "HELLO" {
		t.Errorf("data %q", b)
	}

	stopped.Store(true)
	select {
	case <-session.CloseChan():
	case <-time.After(20 * time.Second):
		t.Error("the SPDY session did not end")
	}

	begin := time.Now()
	if drain(socket); time.Since(begin) > 15*time.Second { // its own deadline is 20 s
		t.Error("the WebSocket session did not end")
	}
}

// slots returns the sum of all counters.
func (f *forwards) slots() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open + f.pending + len(f.pods)
}

func eventually(t *testing.T, condition string, isMet func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !isMet(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", condition)
		}
	}
}

// TestForwardLimits checks the limits of forwarded and of pending connections.
func TestForwardLimits(t *testing.T) {
	var f forwards
	var held []*forward
	for range maxPendingPerPod {
		w, err := f.acquire("a")
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, w)
	}

	check := func(pod, want string) {
		t.Helper()
		if _, err := f.acquire(pod); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}

	check("a", "limit of 64 connections waiting for this pod")

	for _, w := range held {
		w.connected()
		w.connected()
	}

	acquire := func(pod string, n int) {
		for range n {
			w, err := f.acquire(pod)
			if err != nil {
				t.Fatalf("%s: %v", pod, err)
			}
			w.connected()
			held = append(held, w)
		}
	}

	acquire("a", maxForwardsPerPod-maxPendingPerPod)
	check("a", "limit of 256 forwarded connections to this pod")

	for _, pod := range []string{"b", "c", "d"} {
		acquire(pod, maxForwardsPerPod)
	}
	check("e", "limit of 1024 forwarded connections on this node")

	for _, w := range held {
		w.release()
	}

	if n := f.slots(); n != 0 {
		t.Errorf("%d slots are in use after the release", n)
	}

	for i := range maxPending {
		if _, err := f.acquire(fmt.Sprint("pod", i)); err != nil {
			t.Fatal(err)
		}
	}

	check("e", "limit of 128 connections waiting for pods on this node")
}

// TestForwardEndsWithClient checks that connections end when the client disconnects, even if the
// pod is silent.
func TestForwardEndsWithClient(t *testing.T) {
	server, pod := tcpPair(t)
	defer pod.Close()

	s := start(t, fake{netns: host}, func(context.Context, *os.File, netip.AddrPort) (net.Conn, error) {
		return server, nil
	})
	session, nc := dialSPDY(t, forwardURL(t, s), "portforward.k8s.io")
	if _, _, err := connectTo(session, 0, 80); err != nil {
		t.Fatal(err)
	}

	eventually(t, "the connection is open", func() bool { return s.forwards.slots() > 0 })
	nc.Close()
	_ = pod.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := pod.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("connection of the pod: %v, want EOF", err)
	}

	eventually(t, "the connection is closed", func() bool { return s.forwards.slots() == 0 })
}

// TestPodIgnoresInput checks that data ignored by the pod does not block other connections of the
// session.
func TestPodIgnoresInput(t *testing.T) {
	var first atomic.Bool
	port := echo(t)
	s := start(t, fake{netns: host}, func(ctx context.Context, _ *os.File, _ netip.AddrPort) (net.Conn, error) {
		if first.CompareAndSwap(false, true) {
			server, pod := tcpPair(t)
			pod.Close()
			return server, nil
		}
		return new(net.Dialer).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	})

	session, _ := dialSPDY(t, forwardURL(t, s), "portforward.k8s.io")
	data, _, err := connectTo(session, 0, 80)
	if err != nil {
		t.Fatal(err)
	}

	for range 2000 {
		if _, err := data.Write(make([]byte, 32<<10)); err != nil {
			break
		}
	}

	for id := 1; id < 6; id++ { // one for each worker of the session
		if id > 1 {
			port = echo(t)
		}

		data, _, err := connectTo(session, id, 80)
		if err != nil {
			t.Fatal(err)
		}

		if _, err := io.WriteString(data, "hello"); err != nil {
			t.Fatal(err)
		}

		if b, err := io.ReadAll(data); err != nil || string(b) != "HELLO" {
			t.Errorf("connection %d: %q, %v", id, b, err)
		}
	}
}
