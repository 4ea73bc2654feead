package daemon

import (
	"bytes"
	"log/slog"
	"net"
	"net/http"
	"time"

	"cri-dockerd/internal/connlimit"
)

// Every user of the machine can connect to an endpoint on TCP. These bound what one can hold.
const (
	// endpointRequestTimeout is for a whole request, endpointWriteTimeout for reading the answer.
	endpointRequestTimeout = 10 * time.Second
	endpointWriteTimeout   = 30 * time.Second
	// endpointIdleTimeout is longer than Prometheus' usual scrape interval of 15 s to 1 min, so
	// that it can keep its connection.
	endpointIdleTimeout    = 3 * time.Minute
	endpointMaxHeaderBytes = 16 << 10
	// endpointInFlight bounds the answers that are prepared at a time. Each is complete in memory
	// before a client reads it.
	endpointInFlight = 4
)

// endpointLimits bound the connections. The one without a complete request for the longest time
// makes room for a new one.
var endpointLimits = connlimit.Limits{
	Pending:        64,
	PendingPerPeer: 32,
	Answer:         []byte("HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"),
}

// tcpServer returns a server for a TCP listener, and the listener with its limits.
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

// touchIdle marks a connection that has had its answer (http.Server.ConnState).
func touchIdle(c net.Conn, state http.ConnState) {
	if limited, ok := c.(*connlimit.Conn); ok && state == http.StateIdle {
		limited.Touch()
	}
}

// buffered lets as many requests as gate has room for be handled at a time, and writes their
// answers afterwards: a client that reads slowly does not keep others waiting.
func buffered(gate chan struct{}, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := &bufferedAnswer{header: http.Header{}, code: http.StatusOK}
		if !a.handle(gate, next, r) {
			http.Error(w, "too many requests at a time; try again", http.StatusServiceUnavailable)
			return
		}

		for name, values := range a.header {
			w.Header()[name] = values
		}

		w.WriteHeader(a.code)
		_, _ = w.Write(a.body.Bytes())
	})
}

// bufferedAnswer is an answer in memory (http.ResponseWriter).
type bufferedAnswer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

// handle handles a request when there is room. It returns false if there is none until the
// request's time is over.
func (a *bufferedAnswer) handle(gate chan struct{}, next http.Handler, r *http.Request) bool {
	late := time.NewTimer(endpointRequestTimeout)
	defer late.Stop()

	select {
	case gate <- struct{}{}:
		defer func() { <-gate }()
	case <-late.C:
		return false
	case <-r.Context().Done():
		return false
	}

	next.ServeHTTP(a, r)

	return true
}

func (a *bufferedAnswer) Header() http.Header         { return a.header }
func (a *bufferedAnswer) WriteHeader(code int)        { a.code = code }
func (a *bufferedAnswer) Write(p []byte) (int, error) { return a.body.Write(p) }
