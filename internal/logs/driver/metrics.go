package driver

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Reasons for which output was dropped.
const (
	reasonDisk      = "disk"      // the disk took no more
	reasonStalled   = "stalled"   // the disk did not answer in time
	reasonMalformed = "malformed" // Docker's message was not understood
)

// metrics are the process's own. None is global.
type metrics struct {
	registry     *prometheus.Registry
	lines, bytes prometheus.Counter
	dropped      *prometheus.CounterVec
	streams      prometheus.Gauge
	spilled      prometheus.Counter
	alarms       *prometheus.GaugeVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		lines: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cri_dockerd_log_lines_total",
			Help: "Lines and pieces of lines written to container logs.",
		}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cri_dockerd_log_bytes_total",
			Help: "Bytes written to container logs.",
		}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_log_dropped_lines_total",
			Help: "Lines and pieces of lines that were lost, by reason.",
		}, []string{"reason"}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cri_dockerd_log_streams",
			Help: "Containers whose output is being written.",
		}),
		spilled: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cri_dockerd_log_spilled_frames_total",
			Help: "Lines and pieces of lines that were larger than the kernel lets a pipe be.",
		}),
		alarms: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "cri_dockerd_log_alarms",
			Help: "1 while the log-driver process works with less than it needs, by cause: pipes, descriptors, table.",
		}, []string{"cause"}),
	}

	m.registry.MustRegister(m.lines, m.bytes, m.dropped, m.streams, m.spilled, m.alarms)
	for _, r := range []string{reasonDisk, reasonStalled, reasonMalformed} {
		m.dropped.WithLabelValues(r)
	}

	return m
}

// handler serves the metrics in Prometheus' format.
func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
