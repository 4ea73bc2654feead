package nri

import (
	"sync"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/prometheus/client_golang/prometheus"

	"cri-dockerd/internal/text"
)

// maxPlugins bounds the values of the label plugin. Plugins choose their names, and may connect any
// number of times.
const maxPlugins = 64

// metrics counts the calls of plugins (adaptation.Metrics).
type metrics struct {
	calls   *prometheus.CounterVec   // by plugin, event and result
	latency *prometheus.HistogramVec // by plugin and event
	changes *prometheus.CounterVec   // by plugin and kind
	plugins prometheus.Gauge
	names   *names
	builtin int // plugins of the daemon itself, which are not counted
	table   *pluginTable
}

func newMetrics(table *pluginTable) *metrics {
	return &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_nri_plugin_calls_total",
			Help: "Calls of NRI plugins, by plugin, event and result (ok or error).",
		}, []string{"plugin", "event", "result"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "cri_dockerd_nri_plugin_call_duration_seconds",
			Help:    "Duration of calls of NRI plugins, by plugin and event.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5},
		}, []string{"plugin", "event"}),
		changes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_nri_plugin_changes_total",
			Help: "Changes that NRI plugins have requested in responses, by plugin and kind (adjustment, update or " +
				"eviction).",
		}, []string{"plugin", "kind"}),
		plugins: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cri_dockerd_nri_plugins",
			Help: "Registered NRI plugins.",
		}),
		names: &names{known: map[string]bool{}},
		table: table,
	}
}

// Collectors returns the metrics of the plugins.
func (r *Runtime) Collectors() []prometheus.Collector {
	m := r.metrics
	return []prometheus.Collector{m.calls, m.latency, m.changes, m.plugins}
}

// RecordPluginInvocation implements adaptation.Metrics.
func (m *metrics) RecordPluginInvocation(plugin, event string, err error) {
	if plugin == recorderName {
		return
	}

	result := "ok"
	if err != nil {
		result = "error"
	}
	m.table.called(plugin, event, err)
	m.calls.WithLabelValues(m.names.label(plugin), event, result).Inc()
}

// RecordPluginLatency implements adaptation.Metrics.
func (m *metrics) RecordPluginLatency(plugin, event string, d time.Duration) {
	if plugin == recorderName {
		return
	}
	m.latency.WithLabelValues(m.names.label(plugin), event).Observe(d.Seconds())
}

// RecordPluginAdjustments implements adaptation.Metrics.
func (m *metrics) RecordPluginAdjustments(
	plugin, _ string, a *adaptation.ContainerAdjustment, updates, evictions int,
) {
	name := m.names.label(plugin)
	if a != nil {
		m.changes.WithLabelValues(name, "adjustment").Inc()
	}
	m.changes.WithLabelValues(name, "update").Add(float64(updates))
	m.changes.WithLabelValues(name, "eviction").Add(float64(evictions))
}

// UpdatePluginCount implements adaptation.Metrics.
func (m *metrics) UpdatePluginCount(n int) { m.plugins.Set(float64(max(n-m.builtin, 0))) }

// names bounds the names of plugins in labels. The rest is "other".
type names struct {
	mu    sync.Mutex // guards known
	known map[string]bool
}

func (n *names) label(plugin string) string {
	plugin = text.Clean(plugin, text.MaxName)

	n.mu.Lock()
	defer n.mu.Unlock()

	if !n.known[plugin] && len(n.known) >= maxPlugins {
		return "other"
	}
	n.known[plugin] = true

	return plugin
}
