package conformance

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
)

// session is a client of an exec or attach session.
type session struct {
	write  func(text string)               // to stdin
	resize func(text string)               // JSON
	read   func() (out, status string)     // to the end
	await  func(t *testing.T, text string) // reads stdout until it contains text
	hangUp func()
}

// openSession opens a streaming URL over WebSocket or SPDY.
func (n *node) openSession(t *testing.T, protocol, raw string, stdin, tty bool) *session {
	t.Helper()
	if protocol == "SPDY" {
		return n.openSPDYSession(t, raw, stdin, tty)
	}

	c := n.stream(t, raw)
	if err := c.SetReadDeadline(time.Now().Add(scaled(2 * time.Minute))); err != nil {
		t.Fatal(err)
	}

	send := func(channel, text string) {
		if err := c.WriteMessage(websocket.BinaryMessage, []byte(channel+text)); err != nil {
			t.Error(err)
		}
	}

	return &session{
		write:  func(text string) { send("\x00", text) },
		resize: func(text string) { send("\x04", text) },
		read:   func() (string, string) { got := collect(t, c, 0, ""); return got[1], got[3] },
		await: func(t *testing.T, text string) {
			t.Helper()
			if got := collect(t, c, 1, text); !strings.Contains(got[1], text) {
				t.Fatalf("stdout %q, want %q", got[1], text)
			}
		},
		hangUp: func() { c.Close() },
	}
}

func (n *node) openSPDYSession(t *testing.T, raw string, stdin, tty bool) *session {
	t.Helper()
	c, conn := n.openSPDY(t, raw, "v4.channel.k8s.io")
	streams := map[string]httpstream.Stream{}
	for kind, wanted := range map[string]bool{"error": true, "stdout": true, "stdin": stdin, "resize": tty} {
		if !wanted {
			continue
		}
		var err error
		if streams[kind], err = c.CreateStream(http.Header{"Streamtype": {kind}}); err != nil {
			t.Fatal(err)
		}
	}

	return &session{
		write:  func(text string) { _, _ = io.WriteString(streams["stdin"], text) },
		resize: func(text string) { _, _ = io.WriteString(streams["resize"], text) },
		read: func() (string, string) {
			out := make(chan string, 1)
			go func() { b, _ := io.ReadAll(streams["stdout"]); out <- string(b) }()
			end, _ := io.ReadAll(streams["error"])
			return <-out, string(end)
		},
		await: func(t *testing.T, text string) {
			t.Helper()
			got := ""
			for b := make([]byte, 4096); !strings.Contains(got, text); {
				k, err := streams["stdout"].Read(b)
				if got += string(b[:k]); err != nil {
					t.Fatalf("stdout %q, %v, want %q", got, err, text)
				}
			}
		},
		hangUp: func() { conn.Close() },
	}
}

// forBothProtocols runs a test over WebSocket and SPDY.
func forBothProtocols(t *testing.T, test func(t *testing.T, protocol string)) {
	for _, protocol := range []string{"WebSocket", "SPDY"} {
		t.Run(protocol, func(t *testing.T) { test(t, protocol) })
	}
}

func (n *node) execURL(t *testing.T, id string, tty bool, cmd []string) string {
	t.Helper()
	r, err := n.Runtime.Exec(t.Context(), &runtimeapi.ExecRequest{
		ContainerId: id,
		Cmd:         cmd,
		Stdin:       tty,
		Stdout:      true,
		Tty:         tty,
	})
	if err != nil {
		t.Fatal(err)
	}

	return r.Url
}

func (n *node) attachURL(t *testing.T, id string, tty bool) string {
	t.Helper()
	r, err := n.Runtime.Attach(t.Context(), &runtimeapi.AttachRequest{
		ContainerId: id,
		Stdin:       tty,
		Stdout:      true,
		Tty:         tty,
	})
	if err != nil {
		t.Fatal(err)
	}

	return r.Url
}

// parseStatus parses the status at the end of a session.
func parseStatus(t *testing.T, text string) (state, message string) {
	t.Helper()
	var v struct{ Status, Message string }
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Errorf("status %q: %v", text, err)
	}
	return v.Status, v.Message
}
