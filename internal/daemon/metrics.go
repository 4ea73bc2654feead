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

// newRegistry returns the registry of all metrics: those of the parts, and the process's.
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

// collectors are the figures of the parts. A part that has some is added here.
func (p *parts) collectors() []prometheus.Collector {
	return slices.Concat(
		p.engine.Collectors(),
		p.server.Collectors(),
		p.plugins.Collectors(),
		p.view.Collectors(),
		p.gauges(),
		[]prometheus.Collector{
			p.recoveries, logFigures{p.logs, driver.NewClient(driver.Socket)}, p.stats.Collector(),
		},
	)
}

// newRecoveries counts the attempts to clear what a crash or a failed release left.
func newRecoveries() *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "cri_dockerd_recoveries_total",
		Help: "Attempts to clear leftovers, by result (ok, error: something is left and tried again).",
	}, []string{"result"})

	for _, result := range []string{"ok", "error"} {
		c.WithLabelValues(result)
	}

	return c
}

// gauges are states that are looked at when somebody asks.
func (p *parts) gauges() []prometheus.Collector {
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}

	return []prometheus.Collector{
		gauge(
			"cri_dockerd_engine_up",
			"1 if the engine answers, its events flow and the view is complete.",
			func() float64 { return truth(p.view.Engine().Ready) },
		),
		gauge(
			"cri_dockerd_network_ready",
			"1 if pods can be connected.",
			func() float64 { return truth(p.isNetworkReady()) },
		),
		gauge(
			"cri_dockerd_network_attachments",
			"Pods that hold, or may hold, a connection of the pod network.",
			func() float64 { return float64(len(p.network.Attached())) },
		),
		gauge(
			"cri_dockerd_network_debts",
			"Pods whose network could not be released yet; recovery tries on.",
			func() float64 { return float64(p.network.PendingReleases()) },
		),
	}
}

func (p *parts) isNetworkReady() bool {
	_, err := p.network.State()
	return err == nil
}

// buildInfo is a 1 with the labels of this program.
func buildInfo(version string) prometheus.Collector {
	labels := prometheus.Labels{"version": strings.TrimPrefix(version, "cri-dockerd "), "goversion": ""}
	if b, ok := debug.ReadBuildInfo(); ok {
		labels["goversion"] = b.GoVersion
	}

	g := prometheus.NewGauge(
		prometheus.GaugeOpts{
			Name:        "cri_dockerd_build_info",
			Help:        "Always 1; the labels say which program this is.",
			ConstLabels: labels,
		},
	)

	g.Set(1)

	return g
}

// logFigures are how containers are logged, and what the log-driver process says of itself: one
// page has all.
type logFigures struct {
	logs    *logs.Logs
	process *driver.Client
}

// logFiguresDeadline is for the log-driver process's answer; it is asked on a socket of this
// machine and answers from memory.
const logFiguresDeadline = 2 * time.Second

// Describe implements prometheus.Collector; it tells nothing, since the process may be of another
// release and have other figures.
func (logFigures) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (f logFigures) Collect(ch chan<- prometheus.Metric) {
	active, _ := f.logs.State()
	for _, mode := range []string{logs.ModeCRI, logs.ModeJSONFile} {
		ch <- constant("cri_dockerd_log_mode", "1 for the way in which new containers are logged (cri: CRI files, "+
			"json-file: Docker's own behind links).",
			truth(mode == active), prometheus.GaugeValue, "mode", mode)
	}

	ctx, cancel := context.WithTimeout(context.Background(), logFiguresDeadline)
	defer cancel()

	families, err := f.process.Metrics(ctx)
	ch <- constant("cri_dockerd_log_driver_up", "1 if the log-driver process answers.", truth(err == nil),
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

// truth is a state as a figure.
func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// constant is one value; labels are names and values in turn.
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
