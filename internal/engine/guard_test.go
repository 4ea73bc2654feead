package engine

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/moby/moby/client"
)

// countingConn counts writes.
type countingConn struct {
	net.Conn
	writes *atomic.Int32
}

// Write implements net.Conn.
func (c countingConn) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

// TestRequestsAreOneWrite checks that the header and a small body arrive in one write, and that
// bodies of any size arrive complete.
func TestRequestsAreOneWrite(t *testing.T) {
	var received client.ExecCreateOptions
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		received = client.ExecCreateOptions{}
		if err := json.NewDecoder(r.Body).Decode(&received); err != nil {
			t.Errorf("decode the body: %v", err)
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"Id":"` + strings.Repeat("ab", 32) + `"}`))
	}))
	defer server.Close()

	var writes atomic.Int32
	dial := func(ctx context.Context) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", server.Listener.Addr().String())
		return countingConn{conn, &writes}, err
	}

	c, err := newConnection(dial, []client.Opt{client.WithHost("tcp://" + server.Listener.Addr().String())},
		client.WithAPIVersion("1.41"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	for _, size := range []int{1, 1000, maxBufferedBody, 1 << 20} {
		writes.Store(0)
		word := strings.Repeat("x", size)
		opts := client.ExecCreateOptions{Cmd: []string{word}}
		if _, err := c.ExecCreate(t.Context(), strings.Repeat("cd", 32), opts); err != nil {
			t.Fatal(err)
		}

		if len(received.Cmd) != 1 || received.Cmd[0] != word {
			t.Errorf("a command of %d bytes did not arrive", size)
		}
		if n := writes.Load(); size <= 1000 && n != 1 {
			t.Errorf("a request with a body of %d bytes was sent in %d writes, want 1", size, n)
		}
	}
}
