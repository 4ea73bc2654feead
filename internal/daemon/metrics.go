package daemon

import (
	"context"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"

	"cri-dockerd/internal/logs"
	"cri-dockerd/internal/logs/driver"
)

// newRegistry returns a registry with the metrics of the parts and of the process.
func newRegistry(version string, parts ...prometheus.Collector) (*prometheus.Registry, error) {
	r := prometheus.NewRegistry()
	for _, c := range append(parts, buildInfo(version), collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})) {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}

	return r, nil
}

// collectors returns the metrics of all parts.
func (p *parts) collectors() []prometheus.Collector {
	return slices.Concat(
		p.engine.Collectors(),
		p.nriCollectors(),
		p.server.Collectors(),
		p.plugins.Collectors(),
		p.view.Collectors(),
		p.gauges(),
		[]prometheus.Collector{
			p.recoveries,
			logCollector{p.logs, driver.NewClient(driver.Socket)},
			p.stats.Collector(),
		},
	)
}

// newRecoveries returns the counter of attempts to remove leftovers of a crash or a failed release.
func newRecoveries() *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "cri_dockerd_recoveries_total",
		Help: "Attempts to remove leftovers, by result (ok, or error if leftovers remain for the next attempt).",
	}, []string{"result"})

	for _, result := range []string{"ok", "error"} {
		c.WithLabelValues(result)
	}

	return c
}

// gauges returns the metrics of states. Each scrape evaluates them.
func (p *parts) gauges() []prometheus.Collector {
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}

	return []prometheus.Collector{
		gauge(
			"cri_dockerd_engine_up",
			"1 if the engine responds, its event stream is connected and the view is complete.",
			func() float64 { return toFloat(p.view.Engine().Ready) },
		),
		gauge(
			"cri_dockerd_network_ready",
			"1 if the pod network is ready.",
			func() float64 { return toFloat(p.isNetworkReady()) },
		),
		gauge(
			"cri_dockerd_network_attachments",
			"Pods with a possible attachment to the pod network.",
			func() float64 { return float64(len(p.network.Attached())) },
		),
		gauge(
			"cri_dockerd_network_pending_releases",
			"Pods with a failed release of their network; recovery retries the release.",
			func() float64 { return float64(p.network.PendingReleases()) },
		),
	}
}

func (p *parts) isNetworkReady() bool {
	_, err := p.network.State()
	return err == nil
}

// buildInfo returns a constant gauge with the labels of this build.
func buildInfo(version string) prometheus.Collector {
	labels := prometheus.Labels{"version": strings.TrimPrefix(version, "cri-dockerd "), "goversion": ""}
	if b, ok := debug.ReadBuildInfo(); ok {
		labels["goversion"] = b.GoVersion
	}

	g := prometheus.NewGauge(
		prometheus.GaugeOpts{
			Name:        "cri_dockerd_build_info",
			Help:        "Always 1, with the version of the program as labels.",
			ConstLabels: labels,
		},
	)

	g.Set(1)

	return g
}

// logCollector collects the log mode and the metrics of the log-driver process, so that one page
// has all metrics.
type logCollector struct {
	logs    *logs.Logs
	process *driver.Client
}

// logDriverTimeout limits a request to the log-driver process. It responds from memory on a local
// socket.
const logDriverTimeout = 2 * time.Second

// Describe implements prometheus.Collector. It sends no descriptions, because the process may be
// another release with different metrics.
func (logCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c logCollector) Collect(ch chan<- prometheus.Metric) {
	active, _ := c.logs.State()
	for _, mode := range []string{logs.ModeCRI, logs.ModeJSONFile} {
		ch <- constant("cri_dockerd_log_mode",
			"1 for the log mode of new containers (cri: CRI log files, json-file: links to Docker's logs).",
			toFloat(mode == active), prometheus.GaugeValue, "mode", mode)
	}

	ctx, cancel := context.WithTimeout(context.Background(), logDriverTimeout)
	defer cancel()

	families, err := c.process.Metrics(ctx)
	ch <- constant("cri_dockerd_log_driver_up", "1 if the log-driver process responds.", toFloat(err == nil),
		prometheus.GaugeValue)
	for _, family := range families {
		for _, m := range family.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName(), l.GetValue())
			}

			switch family.GetType() {
			case dto.MetricType_COUNTER:
				ch <- constant(family.GetName(), family.GetHelp(), m.GetCounter().GetValue(), prometheus.CounterValue,
					labels...)
			case dto.MetricType_GAUGE:
				ch <- constant(family.GetName(), family.GetHelp(), m.GetGauge().GetValue(), prometheus.GaugeValue,
					labels...)
			}
		}
	}
}

// toFloat returns 1 for true and 0 for false.
func toFloat(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// constant returns a metric with one value. labels alternates between names and values.
func constant(name, help string, value float64, kind prometheus.ValueType, labels ...string) prometheus.Metric {
	var names, values []string
	for i := 0; i+1 < len(labels); i += 2 {
		names, values = append(names, labels[i]), append(values, labels[i+1])
	}

	m, err := prometheus.NewConstMetric(prometheus.NewDesc(name, help, names, nil), kind, value, values...)
	if err != nil {
		return prometheus.NewInvalidMetric(prometheus.NewDesc(name, help, names, nil), err)
	}

	return m
}
