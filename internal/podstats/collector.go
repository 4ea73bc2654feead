package podstats

import (
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Descriptor describes one metric of containers and pods.
type Descriptor struct {
	Name, Help string
	Labels     []string // the SharedLabels first
	Gauge      bool     // else a counter
	// When is the condition for the metric: "with a CPU quota". It is empty if every running
	// container has the metric, itself or by its pod or node.
	When string
}

// SharedLabels is the number of labels common to all metrics.
const SharedLabels = len(sharedLabels)

// Descriptors yields the descriptors of all metrics, always the same ones in the same order.
func Descriptors() iter.Seq[Descriptor] {
	return func(yield func(Descriptor) bool) {
		for _, x := range metrics {
			d := Descriptor{
				Name:   x.name,
				Help:   x.describe(),
				Labels: slices.Concat(sharedLabels[:], x.labels),
				Gauge:  x.isGauge,
				When:   x.when,
			}

			if !yield(d) {
				return
			}
		}
	}
}

// collector serves the metrics to Prometheus, for kubelets without CRI metrics. It reads them on
// collection.
type collector struct {
	reporter *Reporter
	families []family
}

// family is a metric with its labels: the shared ones, and its own.
type family struct {
	Descriptor
	desc *prometheus.Desc
}

// Collector returns the metrics of all running pods under cAdvisor's names. There are none while
// the engine is down.
func (r *Reporter) Collector() prometheus.Collector {
	c := &collector{reporter: r}
	for d := range Descriptors() {
		c.families = append(c.families, family{d, prometheus.NewDesc(d.Name, d.Help, d.Labels, nil)})
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, x := range c.families {
		out <- x.desc
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	for _, m := range c.reporter.measureAll() {
		shared := pairs(sharedLabels[:], m.labels)
		m.report(func(i int, value uint64, labels []string) {
			x := &metrics[i]
			s := &sample{
				family: &c.families[i],
				shared: shared,
				own:    labels,
				value:  float64(value),
				at:     m.measuredAt(x),
			}
			if x.isNanos {
				s.value /= float64(time.Second)
			}

			out <- s
		})
	}
}

// measureAll reads all running pods and containers.
func (r *Reporter) measureAll() []*measured {
	if !r.View.Engine().Ready {
		return nil
	}

	now, pods := time.Now(), r.runningPods(r.View.Sandboxes())
	layers := r.fsLayers(pods)
	all := inParallel(pods, func(p runningPod) []*measured {
		all := r.measurePod(p, maxInterfaces(len(pods)), now)
		for _, c := range p.containers {
			if m := r.measureContainer(p.Sandbox, c, layers, now); m != nil {
				all = append(all, m)
			}
		}
		return all
	})

	return append(slices.Concat(all...), measureNode(layers, now)...)
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

// sample is one value. It shares the labels of its subject with thousands of other samples.
type sample struct {
	family *family
	shared []*dto.LabelPair
	own    []string // values of the metric's own labels
	value  float64
	at     time.Time // zero for now
}

// Desc implements prometheus.Metric.
func (s *sample) Desc() *prometheus.Desc { return s.family.desc }

// Write implements prometheus.Metric.
func (s *sample) Write(out *dto.Metric) error {
	out.Label = s.shared
	if len(s.own) > 0 {
		out.Label = slices.Concat(s.shared, pairs(s.family.Labels[SharedLabels:], s.own))
		slices.SortFunc(out.Label, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
	}

	if s.family.Gauge {
		out.Gauge = &dto.Gauge{Value: &s.value}
	} else {
		out.Counter = &dto.Counter{Value: &s.value}
	}

	if !s.at.IsZero() {
		at := s.at.UnixMilli()
		out.TimestampMs = &at
	}

	return nil
}
