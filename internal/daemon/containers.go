package daemon

import (
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"cri-dockerd/internal/cri"
)

// containerFigures are those of containers and pods under cAdvisor's names, for kubelets that do not ask the CRI for them. They are read when
// somebody collects.
type containerFigures struct {
	samples  func(put func(cri.Sample))
	families []family
}

// family is a metric with its labels: those that all have, and its own.
type family struct {
	cri.MetricDescriptor
	desc *prometheus.Desc
}

func newContainerFigures(samples func(put func(cri.Sample))) *containerFigures {
	f := &containerFigures{samples: samples}
	for d := range cri.Metrics() {
		f.families = append(f.families, family{d, prometheus.NewDesc(d.Name, d.Help, d.Labels, nil)})
	}
	return f
}

// Describe implements prometheus.Collector.
func (f *containerFigures) Describe(out chan<- *prometheus.Desc) {
	for _, x := range f.families {
		out <- x.desc
	}
}

// Collect implements prometheus.Collector.
func (f *containerFigures) Collect(out chan<- prometheus.Metric) {
	var of *cri.Subject
	var shared []*dto.LabelPair
	f.samples(func(s cri.Sample) {
		x := &f.families[s.Descriptor]
		if s.Subject != of { // the samples of one come together
			of, shared = s.Subject, pairs(x.Labels, s.Labels)
		}
		out <- &containerFigure{x, s, shared}
	})
}

func pairs(names, values []string) []*dto.LabelPair {
	all := make([]dto.LabelPair, len(values))
	out := make([]*dto.LabelPair, len(values))
	for i := range values {
		all[i].Name, all[i].Value = &names[i], &values[i]
		out[i] = &all[i]
	}
	return out
}

// containerFigure is one sample. It shares the labels of its subject with the others, of which there are thousands.
type containerFigure struct {
	family *family
	sample cri.Sample
	shared []*dto.LabelPair
}

// Desc implements prometheus.Metric.
func (c *containerFigure) Desc() *prometheus.Desc { return c.family.desc }

// Write implements prometheus.Metric.
func (c *containerFigure) Write(out *dto.Metric) error {
	out.Label = c.shared
	if len(c.sample.Own) > 0 {
		out.Label = slices.Concat(c.shared, pairs(c.family.Labels[len(c.shared):], c.sample.Own))
		slices.SortFunc(out.Label, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
	}
	if c.family.Gauge {
		out.Gauge = &dto.Gauge{Value: &c.sample.Value}
	} else {
		out.Counter = &dto.Counter{Value: &c.sample.Value}
	}
	if !c.sample.At.IsZero() {
		at := c.sample.At.UnixMilli()
		out.TimestampMs = &at
	}
	return nil
}
