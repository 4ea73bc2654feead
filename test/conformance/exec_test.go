package conformance

import (
	"context"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestExecSync checks output, exit code and the limit of the output.
func TestExecSync(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: id,
			Cmd:         sh("echo out; echo err >&2; exit 5"),
			Timeout:     20,
		})
		if err != nil || string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.ExitCode != 5 {
			t.Errorf("ExecSync: %v, %v", r, err)
		}

		r, err = n.Runtime.ExecSync(t.Context(),
			&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"/no/such"}})
		if err != nil || r.ExitCode != 127 || len(r.Stdout) > 0 || !strings.Contains(string(r.Stderr), "/no/such") {
			t.Errorf("missing command: %v, %v", r, err)
		}

		r, err = n.Runtime.ExecSync(t.Context(),
			&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: sh("head -c 20000000 /dev/zero")})
		const most, frame = 16 << 20, 1 << 10 // the kubelet accepts messages of 16 MiB, including framing
		if err != nil || len(r.Stdout) > most || len(r.Stdout) < most-frame {
			t.Errorf("20 MB of output: got %d bytes, %v", len(r.GetStdout()), err)
		}
	})
}

// TestExecSyncTimeoutKillsTheTree runs a command past its timeout. The command and its children are
// killed.
func TestExecSyncTimeoutKillsTheTree(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		begin := time.Now()
		_, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: id,
			Cmd:         sh("trap '' TERM; sleep 4321 & sleep 4322"),
			Timeout:     1,
		})
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("ExecSync: %v", err)
		}

		if d := time.Since(begin); d > scaled(5*time.Second) {
			t.Errorf("ExecSync returned after %v, want about 1 s", d)
		}

		eventually(t, "end of the command's processes", func() bool {
			return !strings.Contains(n.exec(t, id, "ps"), "sleep 432")
		})
	})
}

// dialer returns a dialer of WebSockets inside the engine's network namespace.
func (n *node) dialer() *websocket.Dialer {
	return &websocket.Dialer{
		Subprotocols:     []string{"v5.channel.k8s.io", "v4.channel.k8s.io"},
		HandshakeTimeout: 10 * time.Second,
		NetDialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return n.DialContext(ctx, network, addr)
		},
	}
}

// stream opens a streaming URL with a WebSocket.
func (n *node) stream(t *testing.T, raw string) *websocket.Conn {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "http" || u.Hostname() != "127.0.0.1" {
		t.Fatalf("streaming URL %q: want an absolute URL on loopback: %v", raw, err)
	}

	u.Scheme = "ws"
	c, resp, err := n.dialer().DialContext(t.Context(), u.String(), nil)
	if err != nil {
		t.Fatalf("%s: %v, %v", raw, err, resp)
	}

	t.Cleanup(func() { c.Close() })
	if err := c.SetReadDeadline(time.Now().Add(scaled(20 * time.Second))); err != nil {
		t.Fatal(err)
	}

	return c
}

// collect reads a stream with channels until it ends or channel ch contains want.
func collect(t *testing.T, c *websocket.Conn, ch byte, want string) map[byte]string {
	t.Helper()
	got := map[byte]string{}
	for want == "" || !strings.Contains(got[ch], want) {
		_, m, err := c.ReadMessage()
		if err != nil {
			return got
		}
		if len(m) > 0 {
			got[m[0]] += string(m[1:])
		}
	}

	return got
}

// TestExecStream runs a command over a WebSocket. The URL works once.
func TestExecStream(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		r, err := n.Runtime.Exec(t.Context(), &runtimeapi.ExecRequest{
			ContainerId: id,
			Cmd:         sh("read x; echo got $x; echo e >&2; exit 4"),
			Stdin:       true,
			Stdout:      true,
			Stderr:      true,
		})
		if err != nil {
			t.Fatal(err)
		}

		c := n.stream(t, r.Url)
		if err := c.WriteMessage(websocket.BinaryMessage, []byte("\x00hello\n")); err != nil {
			t.Fatal(err)
		}

		got := collect(t, c, 3, "}")
		if got[1] != "got hello\n" || got[2] != "e\n" || !strings.Contains(got[3], `"4"`) {
			t.Errorf("streams: %q", got)
		}

		u, _ := url.Parse(r.Url)
		u.Scheme = "ws"
		if _, resp, err := n.dialer().DialContext(t.Context(), u.String(), nil); err == nil || resp == nil ||
			resp.StatusCode != http.StatusNotFound {
			t.Errorf("the URL worked twice: %v, %v", resp, err)
		}
	})
}

// TestExecTTY runs a command with a terminal and resizes it.
func TestExecTTY(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		r, err := n.Runtime.Exec(t.Context(), &runtimeapi.ExecRequest{
			ContainerId: id,
			Cmd:         sh("read x; stty size; tty"),
			Stdin:       true,
			Stdout:      true,
			Tty:         true,
		})
		if err != nil {
			t.Fatal(err)
		}

		c := n.stream(t, r.Url)
		resize := []byte("\x04{\"Width\":101,\"Height\":33}")
		if err := c.WriteMessage(websocket.BinaryMessage, resize); err != nil {
			t.Fatal(err)
		}

		// The size has its own channel. The shell must not read its line before the resize arrives.
		eventually(t, "resize of the terminal", func() bool {
			return strings.Contains(n.exec(t, id, "sh", "-c",
				"for f in /dev/pts/*; do stty -F $f size 2>/dev/null; done"), "33 101")
		})

		if err := c.WriteMessage(websocket.BinaryMessage, []byte("\x00go\n")); err != nil {
			t.Fatal(err)
		}

		if got := collect(t, c, 1, "/dev/"); !strings.Contains(got[1], "33 101") ||
			!strings.Contains(got[1], "/dev/pts/") {
			t.Errorf("terminal: %q", got)
		}
	})
}

// TestAttach attaches to a running container and writes to its stdin.
func TestAttach(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cc := n.containerConfig(sh("while read x; do echo got $x; done; echo end of input; sleep 1000"))
		cc.Stdin = true
		id := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
		r, err := n.Runtime.Attach(t.Context(), &runtimeapi.AttachRequest{
			ContainerId: id,
			Stdin:       true,
			Stdout:      true,
			Stderr:      true,
		})
		if err != nil {
			t.Fatal(err)
		}

		c := n.stream(t, r.Url)
		if err := c.WriteMessage(websocket.BinaryMessage, []byte("\x00one\n")); err != nil {
			t.Fatal(err)
		}

		if got := collect(t, c, 1, "got one"); !strings.Contains(got[1], "got one") {
			t.Errorf("attach: %q", got)
		}
	})
}

// TestEndOfAttachedInput ends the input of an attach. The output continues. The container sees the
// end with StdinOnce only.
func TestEndOfAttachedInput(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for once, want := range map[bool]string{false: "got one\n", true: "got one\nend of input\n"} {
			cc := n.containerConfig(sh("while read x; do sleep 1; echo got $x; [ $ONCE = true ] || exit 0; done; " +
				"echo end of input"))
			cc.Stdin, cc.StdinOnce = true, once
			cc.Envs = []*runtimeapi.KeyValue{{Key: "ONCE", Value: []byte(strconv.FormatBool(once))}}
			id := n.startConfig(t, pod, cfg, cc)
			r, err := n.Runtime.Attach(t.Context(), &runtimeapi.AttachRequest{
				ContainerId: id,
				Stdin:       true,
				Stdout:      true,
				Stderr:      true,
			})
			if err != nil {
				t.Fatal(err)
			}

			c := n.stream(t, r.Url)
			for _, message := range []string{"\x00one\n", "\xff\x00"} { // data and end of channel 0
				if err := c.WriteMessage(websocket.BinaryMessage, []byte(message)); err != nil {
					t.Fatal(err)
				}
			}

			if got := collect(t, c, 1, ""); got[1] != want {
				t.Errorf("output with StdinOnce %t: got %q, want %q", once, got[1], want)
			}
		}
	})
}

// TestPortForward fetches a page from a server on the pod's loopback address.
func TestPortForward(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		n.start(t, pod, cfg,
			sh("mkdir /www; echo forwarded page > /www/index.html; exec httpd -f -p 127.0.0.1:8099 -h /www"))
		fetch := func() string {
			r, err := n.Runtime.PortForward(t.Context(),
				&runtimeapi.PortForwardRequest{PodSandboxId: pod, Port: []int32{8099}})
			if err != nil {
				t.Fatal(err)
			}

			c := n.stream(t, r.Url+"?port=8099")
			if err := c.WriteMessage(websocket.BinaryMessage, []byte("\x00GET / HTTP/1.0\r\n\r\n")); err != nil {
				t.Fatal(err)
			}

			return collect(t, c, 0, "forwarded page")[0]
		}

		var got string
		eventually(t, "page from the forwarded port", func() bool {
			got = fetch()
			return strings.Contains(got, "forwarded page")
		})
	})
}
