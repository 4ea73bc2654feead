package rpc

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/status"
)

// rpcMetrics are the metrics of all calls.
type rpcMetrics struct {
	seconds   *prometheus.HistogramVec // by method and code
	inFlight  *prometheus.GaugeVec     // by method
	oversized prometheus.Counter       // rejected responses
}

func newRPCMetrics() rpcMetrics {
	return rpcMetrics{
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cri_dockerd_rpc_duration_seconds",
			Help: "Duration of CRI calls, by method and gRPC code.",
			// Responses from memory take 0.1 ms, the start of a pod 0.1 s, pulls minutes.
			Buckets: []float64{.0001, .0005, .001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60, 300},
		}, []string{"method", "code"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "cri_dockerd_rpc_in_flight",
			Help: "CRI calls in progress, by method.",
		}, []string{"method"}),
		oversized: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cri_dockerd_rpc_oversized_responses_total",
			Help: "CRI responses rejected because they exceed the kubelet's limit of 16 MiB.",
		}),
	}
}

// begin counts a call. The caller must call end with the status error of the call. There are only
// methods of the CRI, so the number of labels is bounded.
func (m rpcMetrics) begin(method string) (end func(took time.Duration, err error)) {
	inFlight := m.inFlight.WithLabelValues(method)
	inFlight.Inc()
	return func(took time.Duration, err error) {
		inFlight.Dec()
		m.seconds.WithLabelValues(method, status.Code(err).String()).Observe(took.Seconds())
	}
}

// Collectors returns the metrics of the calls. Register them once.
func (s *Server) Collectors() []prometheus.Collector {
	return []prometheus.Collector{s.metrics.seconds, s.metrics.inFlight, s.metrics.oversized}
}
