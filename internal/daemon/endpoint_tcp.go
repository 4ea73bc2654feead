package daemon

import (
	"bytes"
	"log/slog"
	"net"
	"net/http"
	"time"

	"cri-dockerd/internal/connlimit"
)

// Limits of an endpoint on TCP. Every local user can connect to it.
const (
	// endpointRequestTimeout limits reading a request, endpointWriteTimeout writing the response.
	endpointRequestTimeout = 10 * time.Second
	endpointWriteTimeout   = 30 * time.Second
	// endpointIdleTimeout exceeds Prometheus' usual scrape interval of 15 s to 1 min, so Prometheus
	// can reuse its connection.
	endpointIdleTimeout    = 3 * time.Minute
	endpointMaxHeaderBytes = 16 << 10
	// endpointInFlight limits concurrent requests. Each response is complete in memory before it is
	// written.
	endpointInFlight = 4
)

// endpointLimits limits the connections. A new connection replaces the one with the longest time
// without a complete request.
var endpointLimits = connlimit.Limits{
	Pending:        64,
	PendingPerPeer: 32,
	Response:       []byte("HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"),
}

// tcpServer returns a server for a TCP listener, and the listener with connection limits.
func (e *endpoint) tcpServer(l net.Listener, errors *slog.Logger) (*http.Server, net.Listener) {
	return &http.Server{
		Handler:           buffered(make(chan struct{}, endpointInFlight), e.handler(false)),
		ReadHeaderTimeout: endpointRequestTimeout,
		ReadTimeout:       endpointRequestTimeout,
		WriteTimeout:      endpointWriteTimeout,
		IdleTimeout:       endpointIdleTimeout,
		MaxHeaderBytes:    endpointMaxHeaderBytes,
		ConnState:         touchIdle,
		ErrorLog:          slog.NewLogLogger(errors.Handler(), slog.LevelDebug),
	}, connlimit.New(l, endpointLimits)
}

// touchIdle marks a connection after a complete response (http.Server.ConnState).
func touchIdle(c net.Conn, state http.ConnState) {
	if limited, ok := c.(*connlimit.Conn); ok && state == http.StateIdle {
		limited.Touch()
	}
}

// buffered handles as many requests at a time as gate has capacity, and writes the responses later.
// Slow clients therefore do not delay other requests.
func buffered(gate chan struct{}, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b := &bufferedResponse{header: http.Header{}, code: http.StatusOK}
		if !b.handle(gate, next, r) {
			http.Error(w, "too many concurrent requests; try again", http.StatusServiceUnavailable)
			return
		}

		for name, values := range b.header {
			w.Header()[name] = values
		}

		w.WriteHeader(b.code)
		_, _ = w.Write(b.body.Bytes())
	})
}

// bufferedResponse is a response in memory (http.ResponseWriter).
type bufferedResponse struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

// handle waits for capacity and handles a request. It returns false if the request expires first.
func (b *bufferedResponse) handle(gate chan struct{}, next http.Handler, r *http.Request) bool {
	expired := time.NewTimer(endpointRequestTimeout)
	defer expired.Stop()

	select {
	case gate <- struct{}{}:
		defer func() { <-gate }()
	case <-expired.C:
		return false
	case <-r.Context().Done():
		return false
	}

	next.ServeHTTP(b, r)

	return true
}

// Header implements http.ResponseWriter.
func (b *bufferedResponse) Header() http.Header { return b.header }

// WriteHeader implements http.ResponseWriter.
func (b *bufferedResponse) WriteHeader(code int) { b.code = code }

// Write implements http.ResponseWriter.
func (b *bufferedResponse) Write(p []byte) (int, error) { return b.body.Write(p) }
