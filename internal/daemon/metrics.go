package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"cri-dockerd/internal/rpc"
)

// metricsHeader is how long a client may take for its request.
const metricsHeader = 10 * time.Second

// serveMetrics serves the daemon's figures in Prometheus' format at /metrics until ctx ends. address is unix:///path or tcp://host:port, ""
// for nowhere.
func serveMetrics(ctx context.Context, address string, figures ...prometheus.Collector) error {
	if address == "" {
		return nil
	}
	l, err := listenMetrics(address)
	if err != nil {
		return fmt.Errorf("--metrics-bind-address %s: %w", address, err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(figures...)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: metricsHeader}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func listenMetrics(address string) (net.Listener, error) {
	if host, ok := strings.CutPrefix(address, "tcp://"); ok {
		return net.Listen("tcp", host)
	}
	return rpc.Listen(address, rpc.TLSFiles{})
}
