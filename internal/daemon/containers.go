package daemon

import (
	"github.com/prometheus/client_golang/prometheus"

	"cri-dockerd/internal/cri"
)

// containerFigures are those of containers and pods under cAdvisor's names, for kubelets that do not ask the CRI for them. They are read when
// somebody collects.
type containerFigures struct {
	samples func(put func(cri.Sample))
	descs   []*prometheus.Desc
	types   []prometheus.ValueType
}

func newContainerFigures(samples func(put func(cri.Sample))) *containerFigures {
	f := &containerFigures{samples: samples}
	for d := range cri.Metrics() {
		f.descs = append(f.descs, prometheus.NewDesc(d.Name, d.Help, d.Labels, nil))
		t := prometheus.CounterValue
		if d.Gauge {
			t = prometheus.GaugeValue
		}
		f.types = append(f.types, t)
	}
	return f
}

// Describe implements prometheus.Collector.
func (f *containerFigures) Describe(out chan<- *prometheus.Desc) {
	for _, d := range f.descs {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (f *containerFigures) Collect(out chan<- prometheus.Metric) {
	f.samples(func(s cri.Sample) {
		m, err := prometheus.NewConstMetric(f.descs[s.Descriptor], f.types[s.Descriptor], s.Value, s.LabelValues...)
		switch {
		case err != nil:
			m = prometheus.NewInvalidMetric(f.descs[s.Descriptor], err)
		case !s.At.IsZero():
			m = prometheus.NewMetricWithTimestamp(s.At, m)
		}
		out <- m
	})
}
