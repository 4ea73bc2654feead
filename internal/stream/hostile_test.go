package stream

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
)

// usage are the resources at risk from hostile clients.
type usage struct {
	goroutines, files int
	heap              uint64
}

func measure(t *testing.T) usage {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}

	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)

	return usage{runtime.NumGoroutine(), len(entries), m.HeapAlloc}
}

// waitForUsage waits until the usage is back at its earlier value.
func waitForUsage(t *testing.T, before usage) {
	t.Helper()
	var now usage
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		now = measure(t)
		if now.goroutines <= before.goroutines+2 && now.files <= before.files+2 && now.heap <= before.heap+8<<20 {
			return
		}
	}

	stacks := make([]byte, 1<<20)
	t.Fatalf("usage after the test %+v, before %+v\n%s", now, before, stacks[:runtime.Stack(stacks, true)])
}

// checkExec checks that a regular client can run a command.
func checkExec(t *testing.T, s *Server) {
	t.Helper()
	begin := time.Now()
	out, _, end := runSPDY(t, execURL(t, s, true), "v4.channel.k8s.io", "hello")
	if _, code, _ := parseStatus(t, end); out != "hello" || code != "7" {
		t.Errorf("exec beside hostile clients: %q, status %q", out, end)
	}
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("exec beside hostile clients took %v", took)
	}
}

// shortTimeout replaces requestTimeout.
const shortTimeout = time.Second

// TestTimeouts checks the timeouts shortened by other tests.
func TestTimeouts(t *testing.T) {
	s := start(t, cat, nil)
	for name, timeout := range map[string]time.Duration{
		"ReadHeaderTimeout": s.http.ReadHeaderTimeout,
		"ReadTimeout":       s.http.ReadTimeout,
		"WriteTimeout":      s.http.WriteTimeout,
		"IdleTimeout":       s.http.IdleTimeout,
		"streamTimeout":     s.streamTimeout,
	} {
		if timeout <= 0 || timeout > 10*time.Second {
			t.Errorf("%s is %v", name, timeout)
		}
	}

	if s.idle <= 0 || s.idle > 4*time.Hour {
		t.Errorf("idle timeout of sessions is %v", s.idle)
	}
}

// TestHostileConnections tests clients without a token that keep their connections open.
func TestHostileConnections(t *testing.T) {
	header := "POST /exec/guess HTTP/1.1\r\nHost: x\r\n"
	for name, sent := range map[string]string{
		"silent":           "",
		"half a line":      "GET /exec/gue",
		"half a header":    header,
		"garbage":          strings.Repeat("\x00\xff\x16\x03\x01garbage", 1000),
		"long header line": header + "X-Long: " + strings.Repeat("x", 1<<20),
		"many headers":     header + strings.Repeat("X: y\r\n", 1<<17),
		"endless body": header + "Transfer-Encoding: chunked\r\n\r\n" +
			strings.Repeat("1000\r\n"+strings.Repeat("x", 0x1000)+"\r\n", 50),
		"promised body": header + "Content-Length: 1000000000\r\n\r\nx",
		"upgrade, no token": header + "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: " +
			"v4.channel.k8s.io\r\n\r\n",
		"pipelined requests": strings.Repeat(header+"\r\n", 1000),
	} {
		t.Run(name, func(t *testing.T) {
			s, err := New(Config{Runtime: cat, Log: discard})
			if err != nil {
				t.Fatal(err)
			}

			s.http.ReadHeaderTimeout, s.http.ReadTimeout, s.http.WriteTimeout = shortTimeout, shortTimeout, shortTimeout
			run(t, s)
			checkExec(t, s)
			before := measure(t)
			var conns []net.Conn
			for range 500 {
				c, err := net.Dial("tcp", s.base.Host)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()

				conns = append(conns, c)
				_ = c.SetWriteDeadline(time.Now().Add(time.Second)) // the server may have closed it
				_, _ = io.WriteString(c, sent)
			}

			checkExec(t, s)
			during := measure(t)
			if during.goroutines > before.goroutines+2*limits.PendingPerPeer+20 || during.heap > before.heap+64<<20 {
				t.Errorf("usage during the attack %+v, before %+v", during, before)
			}

			deadline := time.Now().Add(3 * shortTimeout)
			for _, c := range conns { // the server closes all of them
				_ = c.SetReadDeadline(deadline)
				if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
					t.Fatalf("a connection is still open: %v", err)
				}
				c.Close()
			}

			waitForUsage(t, before)
		})
	}
}

// newFramer returns a writer of arbitrary SPDY frames, without the rules of a client library.
func newFramer(t *testing.T, c net.Conn) *spdy.Framer {
	t.Helper()
	go func() { _, _ = io.Copy(io.Discard, c) }() // ends with the connection
	_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
	f, err := spdy.NewFramer(c, c)
	if err != nil {
		t.Fatal(err)
	}

	return f
}

func syn(id int, headers ...string) *spdy.SynStreamFrame {
	h := http.Header{}
	for i := 0; i+1 < len(headers); i += 2 {
		h.Set(headers[i], headers[i+1])
	}
	return &spdy.SynStreamFrame{StreamId: spdy.StreamId(id), Headers: h}
}

const execProtocol, forwardProtocol = "v4.channel.k8s.io", "portforward.k8s.io"

// writeControl writes the header of a control frame, and a payload of 1 MiB.
func writeControl(c net.Conn, kind uint16, length uint32) {
	b := make([]byte, 8)
	binary.BigEndian.PutUint32(b, 0x80030000|uint32(kind))
	binary.BigEndian.PutUint32(b[4:], length)
	_, _ = c.Write(b)
	_, _ = c.Write(make([]byte, 1<<20))
}

// openAll opens the streams of an exec.
func openAll(f *spdy.Framer) {
	for i, kind := range []string{"error", "stdin", "stdout", "stderr"} {
		_ = f.WriteFrame(syn(2*i+1, "streamType", kind))
	}
}

// attacks are possible with a valid token.
var attacks = map[string]struct {
	protocol string
	attack   func(c net.Conn, f *spdy.Framer)
}{
	"10,000 streams of an exec": {execProtocol, func(_ net.Conn, f *spdy.Framer) {
		for i := range 10_000 {
			_ = f.WriteFrame(syn(2*i+1, "streamType", []string{"stdin", "stdout", "bogus", ""}[i%4]))
		}
	}},
	"10,000 half connections": {forwardProtocol, func(_ net.Conn, f *spdy.Framer) {
		for i := range 10_000 {
			_ = f.WriteFrame(syn(2*i+1, "streamType", "error", "port", "80", "requestID", fmt.Sprint(i)))
		}
	}},
	"10,000 connections": {forwardProtocol, func(_ net.Conn, f *spdy.Framer) {
		for i := range 10_000 {
			_ = f.WriteFrame(syn(2*i+1, "streamType", []string{"error", "data"}[i%2], "port", "1", "requestID",
				fmt.Sprint(i/2)))
		}
	}},
	"10,000 streams with a reset": {forwardProtocol, func(_ net.Conn, f *spdy.Framer) {
		for i := range 10_000 {
			_ = f.WriteFrame(syn(2*i+1, "streamType", "error", "port", "80", "requestID", fmt.Sprint(i)))
			_ = f.WriteFrame(&spdy.RstStreamFrame{StreamId: spdy.StreamId(2*i + 1), Status: spdy.Cancel})
		}
	}},
	"headers after the start": {execProtocol, func(_ net.Conn, f *spdy.Framer) {
		openAll(f)
		for range 1000 {
			_ = f.WriteFrame(&spdy.HeadersFrame{StreamId: 3, Headers: http.Header{"X": {"y"}}})
		}
	}},
	"unexpected replies": {execProtocol, func(_ net.Conn, f *spdy.Framer) {
		openAll(f)
		for i := range 1000 {
			_ = f.WriteFrame(&spdy.SynReplyFrame{StreamId: spdy.StreamId(i), Headers: http.Header{}})
		}
	}},
	"pings": {execProtocol, func(_ net.Conn, f *spdy.Framer) {
		for range 20_000 {
			_ = f.WriteFrame(&spdy.PingFrame{Id: 1})
		}
	}},
	"a large control frame": {execProtocol, func(c net.Conn, _ *spdy.Framer) {
		writeControl(c, synStream, lengthMask)
	}},
	"an unknown frame": {execProtocol, func(c net.Conn, _ *spdy.Framer) { writeControl(c, 77, 8) }},
	"garbage": {execProtocol, func(c net.Conn, _ *spdy.Framer) {
		_, _ = io.WriteString(c, strings.Repeat("garbage", 100_000))
	}},
	"unread large data frames": {execProtocol, func(_ net.Conn, f *spdy.Framer) {
		openAll(f)
		for range 20 {
			_ = f.WriteFrame(&spdy.DataFrame{StreamId: 5, Data: make([]byte, 8<<20)})
		}
	}},
	"data on unknown streams": {forwardProtocol, func(_ net.Conn, f *spdy.Framer) {
		for i := range 10_000 {
			_ = f.WriteFrame(&spdy.DataFrame{StreamId: spdy.StreamId(2*i + 1), Data: []byte("x")})
		}
	}},
	"frames after GOAWAY": {execProtocol, func(_ net.Conn, f *spdy.Framer) {
		openAll(f)
		_ = f.WriteFrame(&spdy.GoAwayFrame{})
		openAll(f)
	}},
}

// TestHostileSessions tests hostile clients with a valid token.
func TestHostileSessions(t *testing.T) {
	for name, test := range attacks {
		t.Run(name, func(t *testing.T) {
			s := start(t, cat, dialHost)
			checkExec(t, s)
			before := measure(t)
			for range 2 {
				raw := execURL(t, s, true)
				if test.protocol == forwardProtocol {
					raw = forwardURL(t, s)
				}

				c := upgradeSPDY(t, raw, test.protocol)
				test.attack(c, newFramer(t, c))
				during := measure(t)
				if during.heap > before.heap+48<<20 || during.goroutines > before.goroutines+3*2*maxUnpaired {
					t.Errorf("usage during the attack %+v, before %+v", during, before)
				}

				checkExec(t, s)
				c.Close()
			}

			waitForUsage(t, before)
		})
	}
}

// TestEndlessResize checks that an endless terminal size is not read into memory and does not block
// the session.
func TestEndlessResize(t *testing.T) {
	s := start(t, cat, nil)
	before := measure(t)
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

	session, nc := dialSPDY(t, r.Url, "v4.channel.k8s.io")
	for _, kind := range []string{"error", "stdin", "stdout"} {
		create(t, session, "streamType", kind)
	}

	resize := create(t, session, "streamType", "resize")
	piece := []byte(strings.Repeat("1", 1<<20))
	if _, err := io.WriteString(resize, `{"Width":`); err != nil {
		t.Fatal(err)
	}

	_ = nc.SetWriteDeadline(time.Now().Add(10 * time.Second))
	for range 64 {
		if _, err := resize.Write(piece); err != nil {
			t.Fatal(err)
		}
	}

	if during := measure(t); during.heap > before.heap+32<<20 {
		t.Errorf("usage during the resize %+v, before %+v", during, before)
	}

	session.Close()
	nc.Close()
	waitForUsage(t, before)
}

// TestIdleSessionsEnd checks that a session without traffic ends, and a session with traffic
// continues.
func TestIdleSessionsEnd(t *testing.T) {
	s, err := New(Config{Runtime: fake{attach: func(ctx context.Context, _ string, x engine.Streams) error {
		_, err := io.Copy(x.Stdout, x.Stdin)
		return err
	}}, Log: discard})
	if err != nil {
		t.Fatal(err)
	}

	s.idle = 400 * time.Millisecond
	run(t, s)
	r, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}

	c := mustOpen(t, r.Url)
	for range 5 {
		time.Sleep(200 * time.Millisecond)
		if err := c.WriteMessage(websocket.PingMessage, nil); err != nil {
			t.Fatalf("session with traffic: %v", err)
		}
	}

	begin := time.Now()
	drain(c)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("the idle session ended after %v", took)
	}
}

// TestSessionsAreBounded checks that a client beyond the limit receives the reason, and that a
// disconnect frees a slot even if the command continues.
func TestSessionsAreBounded(t *testing.T) {
	end := make(chan struct{})
	s := start(t, fake{exec: func(context.Context, string, engine.Exec) (int, error) { <-end; return 0, nil }}, nil)
	t.Cleanup(func() { close(end) })
	for range limits.Kept - 1 {
		mustOpen(t, execURL(t, s, false))
	}

	session, last := dialSPDY(t, execURL(t, s, false), "v4.channel.k8s.io")
	for _, kind := range []string{"error", "stdout", "stderr"} {
		create(t, session, "streamType", kind)
	}

	_, resp, err := open(t, execURL(t, s, false))
	if err == nil || resp == nil || resp.StatusCode != http.StatusServiceUnavailable {
		t.Fatalf("session beyond the limit: %v, %v", resp, err)
	}

	if b, _ := io.ReadAll(resp.Body); !strings.Contains(string(b), "too many open connections: 512") {
		t.Errorf("session beyond the limit: response %q", b)
	}

	last.Close()
	eventually(t, "a slot is free", func() bool {
		_, _, err := open(t, execURL(t, s, false))
		return err == nil
	})
}

// TestNoStreams checks that a session without streams ends.
func TestNoStreams(t *testing.T) {
	s, err := New(Config{Runtime: cat, Log: discard})
	if err != nil {
		t.Fatal(err)
	}

	s.streamTimeout = 300 * time.Millisecond
	run(t, s)
	c := upgradeSPDY(t, execURL(t, s, true), "v4.channel.k8s.io")
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Errorf("the session has not ended: %v", err)
	}
}

// TestTokens checks that a token is valid for its own request, for one use and for a minute.
func TestTokens(t *testing.T) {
	s := start(t, cat, nil)
	u, err := url.Parse(execURL(t, s, false))
	if err != nil {
		t.Fatal(err)
	}

	u.Path = strings.Replace(u.Path, "exec", "attach", 1)
	resp, err := http.Get(u.String()) //nolint:gosec // the test's own server
	if err != nil || resp.StatusCode != http.StatusNotFound {
		t.Errorf("attach with the token of an exec: %v, %v", resp, err)
	}

	resp.Body.Close()

	var k tokens
	now := time.Now()
	var first string
	for i := range maxTokens {
		token, err := k.add(i, now)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = token
		}
	}

	if _, err := k.add("one more", now); err == nil ||
		!strings.Contains(err.Error(), "limit of 1000 unused streaming URLs") {
		t.Errorf("token beyond the limit: %v", err)
	}

	if _, ok := k.take(first, now.Add(tokenTTL+time.Second)); ok {
		t.Error("an expired token is accepted")
	}
	if _, err := k.add("later", now.Add(tokenTTL+time.Second)); err != nil || len(k.unused) != 1 {
		t.Errorf("%d unused tokens, want 1: %v", len(k.unused), err)
	}
}

// TestUnpairedStreams checks the limit of connections with only one stream: the server resets
// further streams immediately, and the others after the timeout.
func TestUnpairedStreams(t *testing.T) {
	const extra = 100
	s, err := New(Config{Runtime: cat, Log: discard})
	if err != nil {
		t.Fatal(err)
	}

	s.streamTimeout = 2 * time.Second
	run(t, s)
	c := upgradeSPDY(t, forwardURL(t, s), "portforward.k8s.io")
	f, err := spdy.NewFramer(c, c)
	if err != nil {
		t.Fatal(err)
	}

	for i := range maxUnpaired + extra {
		frame := syn(2*i+1, "streamType", "error", "port", "80", "requestID", fmt.Sprint(i))
		if err := f.WriteFrame(frame); err != nil {
			t.Fatal(err)
		}
	}

	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	begin := time.Now()
	for resets := 0; resets < extra+maxUnpaired; {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatalf("after %d resets: %v", resets, err)
		}

		if _, reset := frame.(*spdy.RstStreamFrame); !reset {
			continue
		}
		if resets++; resets == extra && time.Since(begin) > s.streamTimeout/2 {
			t.Errorf("streams beyond the limit were reset after %v", time.Since(begin))
		}
	}

	if took := time.Since(begin); took < s.streamTimeout/2 {
		t.Errorf("streams within the limit were reset after %v", took)
	}
}
