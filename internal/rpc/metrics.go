package rpc

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/status"
)

// rpcMetrics are the figures of all calls.
type rpcMetrics struct {
	seconds  *prometheus.HistogramVec // by method and code
	inFlight *prometheus.GaugeVec     // by method
	// oversized counts answers that were refused.
	oversized prometheus.Counter
}

func newRPCMetrics() rpcMetrics {
	return rpcMetrics{
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cri_dockerd_rpc_duration_seconds",
			Help: "Time of the CRI's calls until their end, by method and gRPC code.",
			// Answers from memory take a tenth of a millisecond, a pod's start a tenth of a second,
			// pulls minutes.
			Buckets: []float64{.0001, .0005, .001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60, 300},
		}, []string{"method", "code"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "cri_dockerd_rpc_in_flight",
			Help: "Calls of the CRI that are under way, by method.",
		}, []string{"method"}),
		oversized: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cri_dockerd_rpc_oversized_answers_total",
			Help: "Answers of the CRI that were refused because they exceed the kubelet's limit of 16 MiB.",
		}),
	}
}

// begin counts a call; end is to be called with its error, which carries a status. Only methods of
// the CRI come here, so that the labels are bounded.
func (m rpcMetrics) begin(method string) (end func(took time.Duration, err error)) {
	flying := m.inFlight.WithLabelValues(method)
	flying.Inc()
	return func(took time.Duration, err error) {
		flying.Dec()
		m.seconds.WithLabelValues(method, status.Code(err).String()).Observe(took.Seconds())
	}
}

// Collectors are the figures of the calls, to be registered once.
func (s *Server) Collectors() []prometheus.Collector {
	return []prometheus.Collector{s.metrics.seconds, s.metrics.inFlight, s.metrics.oversized}
}
