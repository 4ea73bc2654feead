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
	// headerDeadline is how long a client of the endpoint may take for its request.
	headerDeadline = 10 * time.Second
	// healthDeadline is how long the checks of health may take: they ask memory, so that something
	// is stuck if they do not answer.
	healthDeadline = 5 * time.Second
)

// check is one thing that must hold. Its error says in words what does not, and what mends it.
type check struct {
	name string
	ask  func(ctx context.Context) error
}

// endpoint serves what the node's operator asks over HTTP: figures, health and, on a unix socket
// only, profiles.
type endpoint struct {
	metrics *prometheus.Registry
	alive   []check // of /healthz: a restart mends what fails
	ready   []check // of /readyz: pods can be made
	log     *slog.Logger
}

// listenEndpoint opens unix:///path, which is for root and the group docker, or tcp://host:port;
// nil for "".
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

// open says whether others than this machine's users may reach a listener.
func open(l net.Listener) bool {
	a, err := netip.ParseAddrPort(l.Addr().String())
	return l.Addr().Network() == "tcp" && (err != nil || !a.Addr().IsLoopback())
}

// serve answers on l until ctx ends; without a listener it returns at once.
func (e *endpoint) serve(ctx context.Context, l net.Listener) error {
	if l == nil {
		return nil
	}

	if open(l) {
		e.log.Warn("everybody who reaches this address can read the names of this node's pods and images", "flag",
			metricsFlag, "address", l.Addr())
	}

	errorLog := e.log.With("from", "metrics")
	srv := &http.Server{
		Handler:           e.handler(true),
		ReadHeaderTimeout: headerDeadline,
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

// handler is what is served; private adds what only this machine's administrators may have:
// profiles tell of memory's content, and taking them costs.
func (e *endpoint) handler(private bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(e.metrics, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(e.log.Handler(), slog.LevelWarn), ErrorHandling: promhttp.ContinueOnError,
	}))
	mux.Handle("GET /healthz", http.TimeoutHandler(answer(e.alive), healthDeadline, "stuck: the checks do not end\n"))
	mux.Handle("GET /readyz", http.TimeoutHandler(answer(e.ready), healthDeadline, "stuck: the checks do not end\n"))
	if private {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index) // also every named profile
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}

	return mux
}

// answer runs checks: 200 if all hold, 503 else, with a line for each. ?exclude=<name> leaves one
// out.
func answer(checks []check) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var text strings.Builder
		code := http.StatusOK
		for _, c := range checks {
			if slices.Contains(r.URL.Query()["exclude"], c.name) {
				continue
			}

			if err := c.ask(r.Context()); err != nil {
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
