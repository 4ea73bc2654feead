package daemon

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// startTCP serves an endpoint on loopback.
func startTCP(t *testing.T, e *endpoint) (addr string) {
	t.Helper()
	l, err := listenEndpoint("tcp://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- e.serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})

	return l.Addr().String()
}

// count returns the number of goroutines and of open descriptors.
func count(t *testing.T) (goroutines, files int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return runtime.NumGoroutine(), len(entries)
}

// TestHostileMetricsClients checks that silent, slow and endless clients neither block a scrape nor
// exceed the limits.
func TestHostileMetricsClients(t *testing.T) {
	addr := startTCP(t, newEndpoint())
	goroutines, files := count(t)
	var conns []net.Conn
	for i := range 300 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}

		conns = append(conns, c)
		_ = c.SetWriteDeadline(time.Now().Add(time.Second)) // the daemon may have closed it
		switch i % 5 {
		case 1:
			_, _ = io.WriteString(c, "GET /metrics HT")
		case 2:
			_, _ = io.WriteString(c, "\x00\xff\x16\x03garbage\r\n\r\n")
		case 3:
			_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nX: "+strings.Repeat("x", 1<<20))
		case 4:
			_, _ = io.WriteString(c,
				"POST /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
		}
	}

	start := time.Now()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * time.Second}
	r, err := client.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}

	r.Body.Close()
	if r.StatusCode != http.StatusOK || time.Since(start) > time.Second {
		t.Errorf("status %d after %v", r.StatusCode, time.Since(start))
	}
	if g, f := count(t); g > goroutines+2*endpointLimits.Pending+10 || f > files+len(conns)+endpointLimits.Pending+10 {
		t.Errorf("%d goroutines and %d descriptors, %d and %d before", g, f, goroutines, files)
	}

	for _, c := range conns {
		c.Close()
	}

	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		g, f := count(t)
		if g <= goroutines+2 && f <= files+2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines and %d descriptors remain, %d and %d before", g, f, goroutines, files)
		}
	}
}

// TestIdleMetricsClientsEnd checks that the server closes connections without a request.
func TestIdleMetricsClientsEnd(t *testing.T) {
	srv, _ := newEndpoint().tcpServer(nil, newEndpoint().log)
	for name, timeout := range map[string]time.Duration{
		"ReadHeaderTimeout": srv.ReadHeaderTimeout,
		"ReadTimeout":       srv.ReadTimeout,
		"WriteTimeout":      srv.WriteTimeout,
		"IdleTimeout":       srv.IdleTimeout,
	} {
		if timeout <= 0 || timeout > 5*time.Minute {
			t.Errorf("%s: got %v", name, timeout)
		}
	}

	addr := startTCP(t, newEndpoint())
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\n"); err != nil {
		t.Fatal(err)
	}

	_ = c.SetReadDeadline(time.Now().Add(endpointRequestTimeout + 5*time.Second))
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("slow client is still connected: %v", err)
	}
}

// TestSlowReadersDoNotBlock checks that clients with unread responses do not use the capacity for
// other requests.
func TestSlowReadersDoNotBlock(t *testing.T) {
	big := strings.Repeat("x", 16<<20)
	gate := make(chan struct{}, 1)
	h := buffered(gate, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, big)
	}))
	slow := &stuckWriter{
		header:  http.Header{},
		entered: make(chan struct{}),
		release: make(chan struct{}),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.ServeHTTP(slow, &http.Request{})
	}()

	<-slow.entered
	if code, body := get(h, "/"); code != http.StatusOK || len(body) != len(big) {
		t.Errorf("got status %d and %d bytes, want %d bytes", code, len(body), len(big))
	}

	close(slow.release)
	<-done
}

// stuckWriter blocks in Write until release is closed.
type stuckWriter struct {
	header           http.Header
	entered, release chan struct{}
}

func (w *stuckWriter) Header() http.Header { return w.header }
func (w *stuckWriter) WriteHeader(int)     {}
func (w *stuckWriter) Write(p []byte) (int, error) {
	close(w.entered)
	<-w.release
	return len(p), nil
}
