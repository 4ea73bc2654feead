package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"cri-dockerd/internal/rpc"
)

const (
	metricsFlag = "--metrics-bind-address"
	// headerTimeout limits the time for a client to send the header of a request.
	headerTimeout = 10 * time.Second
	// healthTimeout limits the duration of the health checks. They only read memory, so a part
	// hangs if they take longer.
	healthTimeout = 5 * time.Second
)

// check is a health check. Its error describes the problem and the fix.
type check struct {
	name string
	run  func(ctx context.Context) error
}

// endpoint serves metrics, health checks and, on unix sockets only, profiles over HTTP.
type endpoint struct {
	metrics *prometheus.Registry
	alive   []check // of /healthz: a restart fixes failures
	ready   []check // of /readyz: pods can be created
	log     *slog.Logger
}

// listenEndpoint listens on unix:///path, for root and the group docker, or on tcp://host:port. It
// returns nil for "".
func listenEndpoint(address string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return rpc.ListenUnix(metricsFlag, path)
	}
	if address == "" {
		return nil, nil
	}

	l, err := net.Listen("tcp", strings.TrimPrefix(address, "tcp://"))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", metricsFlag, address, err)
	}

	return l, nil
}

// isRemote reports whether other hosts may reach a listener.
func isRemote(l net.Listener) bool {
	a, err := netip.ParseAddrPort(l.Addr().String())
	return l.Addr().Network() == "tcp" && (err != nil || !a.Addr().IsLoopback())
}

// serve serves requests on l until ctx ends. Without a listener it returns immediately.
func (e *endpoint) serve(ctx context.Context, l net.Listener) error {
	if l == nil {
		return nil
	}

	if isRemote(l) {
		e.log.Warn("the metrics endpoint has no access control and exposes the names of pods and images to other hosts",
			"flag", metricsFlag, "address", l.Addr())
	}

	errorLog := e.log.With("component", "metrics")
	srv := &http.Server{
		Handler:           e.handler(true),
		ReadHeaderTimeout: headerTimeout,
		ErrorLog:          slog.NewLogLogger(errorLog.Handler(), slog.LevelDebug),
	}
	if l.Addr().Network() != "unix" {
		srv, l = e.tcpServer(l, errorLog)
	}

	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()

	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("%s: %w", metricsFlag, err)
	}

	return nil
}

// handler returns the handler of all paths. Profiles are for administrators of this node only,
// because they expose the content of memory and consume CPU time.
func (e *endpoint) handler(withProfiles bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(e.metrics, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(e.log.Handler(), slog.LevelWarn),
		ErrorHandling: promhttp.ContinueOnError,
	}))
	mux.Handle("GET /healthz", http.TimeoutHandler(runChecks(e.alive), healthTimeout, "health checks timed out\n"))
	mux.Handle("GET /readyz", http.TimeoutHandler(runChecks(e.ready), healthTimeout, "health checks timed out\n"))
	if withProfiles {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index) // also serves the named profiles
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}

	return mux
}

// runChecks returns a handler to run checks. It responds with a line for each check, and with
// status 200 if all of them succeed, otherwise 503. ?exclude=<name> skips a check.
func runChecks(checks []check) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var text strings.Builder
		code := http.StatusOK
		for _, c := range checks {
			if slices.Contains(r.URL.Query()["exclude"], c.name) {
				continue
			}

			if err := c.run(r.Context()); err != nil {
				code = http.StatusServiceUnavailable
				fmt.Fprintf(&text, "%s: %v\n", c.name, err)
			} else {
				fmt.Fprintf(&text, "%s: ok\n", c.name)
			}
		}

		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(code)
		_, _ = w.Write([]byte(text.String()))
	})
}
