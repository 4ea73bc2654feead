package driver

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Reasons for dropped output.
const (
	reasonDisk      = "disk"      // a write failed
	reasonStalled   = "stalled"   // the disk did not respond in time
	reasonMalformed = "malformed" // a malformed message from Docker
)

// metrics are the process's own. No metric is global.
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
			Help: "Lines and partial lines written to container logs.",
		}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cri_dockerd_log_bytes_total",
			Help: "Bytes written to container logs.",
		}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_log_dropped_lines_total",
			Help: "Lines and partial lines dropped, by reason.",
		}, []string{"reason"}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cri_dockerd_log_streams",
			Help: "Containers with an open log stream.",
		}),
		spilled: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cri_dockerd_log_spilled_frames_total",
			Help: "Lines and partial lines larger than the capacity of the kernel's pipes.",
		}),
		alarms: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "cri_dockerd_log_alarms",
			Help: "1 while the log-driver process lacks a resource, by cause: pipes, descriptors, table.",
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
