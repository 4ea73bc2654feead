package e2e

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// A session is an exec, attach or port-forward through the kubelet over either protocol.
type session interface {
	write(t *testing.T, text string)
	// read reads standard output (or a port's data) until it contains want.
	read(t *testing.T, want string) string
}

const streamTimeout = 20 * time.Second

// streams tests every kind of stream over both protocols.
func streams(t *testing.T, k *kubelet) {
	protocols := map[string]func(t *testing.T, path string, q url.Values) session{
		"WebSocket": k.webSocket,
		"SPDY":      k.spdy,
	}

	for protocol, open := range protocols {
		t.Run(protocol, func(t *testing.T) {
			t.Run("exec", func(t *testing.T) {
				s := open(t, "/exec/default/web-node/web", query("input", "output", "error", "command=sh", "command=-c",
					"command=read x; echo got $x; tty"))
				s.write(t, "hello\n")
				if got := s.read(t, "not a tty"); !strings.Contains(got, "got hello\n") {
					t.Errorf("output %q", got)
				}
			})

			t.Run("exec with TTY", func(t *testing.T) {
				s := open(t, "/exec/default/web-node/web", query("input", "output", "tty", "command=sh", "command=-c",
					"command=read x; echo got $x; tty"))
				s.write(t, "hello\n")
				if got := s.read(t, "/dev/pts/"); !strings.Contains(got, "got hello\r\n") {
					t.Errorf("output %q", got)
				}
			})

			t.Run("attach", func(t *testing.T) {
				s := open(t, "/attach/default/web-node/tick", query("input", "output", "error"))
				s.write(t, "by "+protocol+"\n")
				s.read(t, "heard by "+protocol+"\n")
			})

			t.Run("port-forward", func(t *testing.T) {
				s := open(t, "/portForward/default/web-node", query("port=8080"))
				s.write(t, "GET / HTTP/1.0\r\n\r\n")
				s.read(t, "the page of the pod\n")
			})
		})
	}
}

func query(args ...string) url.Values {
	q := url.Values{}
	for _, a := range args {
		key, value, ok := strings.Cut(a, "=")
		if !ok {
			value = "1"
		}
		q.Add(key, value)
	}

	return q
}

// readUntil reads until the text contains want.
func readUntil(t *testing.T, want string, next func() ([]byte, error)) string {
	t.Helper()
	var text strings.Builder
	for !strings.Contains(text.String(), want) {
		b, err := next()
		text.Write(b)
		if err != nil && !strings.Contains(text.String(), want) {
			t.Fatalf("read until %q: got %q, then %v", want, text.String(), err)
		}
	}

	return text.String()
}

type webSocketSession struct {
	conn    *websocket.Conn
	in, out byte // channels
}

func (k *kubelet) webSocket(t *testing.T, path string, q url.Values) session {
	t.Helper()
	d := websocket.Dialer{
		Subprotocols:      []string{"v4.channel.k8s.io"},
		HandshakeTimeout:  streamTimeout,
		NetDialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return k.dial(ctx) },
	}

	c, r, err := d.DialContext(t.Context(), "wss://127.0.0.1:10250"+path+"?"+q.Encode(), nil)
	if err != nil {
		t.Fatalf("%s: %v, %v", path, err, r)
	}

	t.Cleanup(func() { c.Close() })
	if err := c.SetReadDeadline(time.Now().Add(streamTimeout)); err != nil {
		t.Fatal(err)
	}

	s := &webSocketSession{conn: c, out: 1}
	if strings.HasPrefix(path, "/portForward") {
		s.out = 0
	}

	return s
}

func (s *webSocketSession) write(t *testing.T, text string) {
	t.Helper()
	if err := s.conn.WriteMessage(websocket.BinaryMessage, append([]byte{s.in}, text...)); err != nil {
		t.Fatal(err)
	}
}

func (s *webSocketSession) read(t *testing.T, want string) string {
	t.Helper()
	return readUntil(t, want, func() ([]byte, error) {
		_, m, err := s.conn.ReadMessage()
		if err != nil || len(m) == 0 || m[0] != s.out {
			return nil, err
		}
		return m[1:], nil
	})
}

type spdySession struct{ in, out httpstream.Stream }

// spdy upgrades a connection without a client library, since the node's loopback is in another
// network namespace.
func (k *kubelet) spdy(t *testing.T, path string, q url.Values) session {
	t.Helper()
	conn, err := k.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	if err := conn.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
		t.Fatal(err)
	}

	protocol := "v4.channel.k8s.io"
	forward := strings.HasPrefix(path, "/portForward")
	if forward {
		protocol = "portforward.k8s.io"
	}

	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://127.0.0.1:10250"+path+"?"+q.Encode(),
		nil)
	if err != nil {
		t.Fatal(err)
	}

	req.Header = http.Header{
		"Connection":                {"Upgrade"},
		"Upgrade":                   {"SPDY/3.1"},
		"X-Stream-Protocol-Version": {protocol},
	}
	if err := req.Write(conn); err != nil {
		t.Fatal(err)
	}

	buffered := bufio.NewReader(conn)
	resp, err := http.ReadResponse(buffered, req)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%s: %v, %v", path, resp, err)
	}

	c, err := spdy.NewClientConnection(&bufferedConn{Conn: conn, r: buffered})
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { c.Close() })
	create := func(header http.Header) httpstream.Stream {
		s, err := c.CreateStream(header)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if forward {
		create(http.Header{"Streamtype": {"error"}, "Port": q["port"], "Requestid": {"0"}}).Close()
		data := create(http.Header{"Streamtype": {"data"}, "Port": q["port"], "Requestid": {"0"}})
		return &spdySession{in: data, out: data}
	}

	create(http.Header{"Streamtype": {"error"}})
	s := &spdySession{
		in:  create(http.Header{"Streamtype": {"stdin"}}),
		out: create(http.Header{"Streamtype": {"stdout"}}),
	}
	if q.Has("error") {
		create(http.Header{"Streamtype": {"stderr"}})
	}
	if q.Has("tty") {
		create(http.Header{"Streamtype": {"resize"}})
	}

	return s
}

// bufferedConn is a connection with buffered input.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

func (s *spdySession) write(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(s.in, text); err != nil {
		t.Fatal(err)
	}
}

func (s *spdySession) read(t *testing.T, want string) string {
	t.Helper()
	return readUntil(t, want, func() ([]byte, error) {
		b := make([]byte, 4096)
		n, err := s.out.Read(b)
		return b[:n], err
	})
}
