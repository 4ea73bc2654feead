package cri

import (
	"iter"
	"slices"
	"time"
)

// MetricDescriptor describes one of the metrics of containers and pods.
type MetricDescriptor struct {
	Name, Help string
	Labels     []string
	Gauge      bool // a counter else
}

// Sample is one figure: that of a descriptor with the values of its labels.
type Sample struct {
	Descriptor int // which one of Metrics, from 0
	Value      float64
	At         time.Time // when it was measured; zero for now
	Own        []string  // values of the labels that not all metrics have
	*Subject
}

// SharedLabels is how many labels every metric has; they come first.
const SharedLabels = 6

// Subject is what figures are of: a container, a pod, or a pod's network.
type Subject struct{ Labels []string } // values of the shared labels

// Metrics are the descriptors of all metrics of containers and pods, always the same and in the same order.
func Metrics() iter.Seq[MetricDescriptor] {
	return func(yield func(MetricDescriptor) bool) {
		for _, x := range metrics {
			if !yield(MetricDescriptor{Name: x.name, Help: x.help, Labels: slices.Concat(metricLabels[:], x.labels), Gauge: x.gauge}) {
				return
			}
		}
	}
}

// Samples reads the metrics of everything that runs, for those who do not ask through the CRI. There are none while the engine is down.
func (s *Service) Samples(put func(Sample)) {
	host, err := s.host()
	if err != nil {
		return
	}
	now, pods := time.Now(), s.runningPods(s.View.Sandboxes())
	layers := s.fsLayers(host, pods)
	all := sideBySide(pods, func(p runningPod) []*measured {
		all := s.measurePod(p, maxInterfaces(len(pods)), now)
		for _, c := range p.containers {
			if m := s.measureContainer(p.Sandbox, c, layers, now); m != nil {
				all = append(all, m)
			}
		}
		return all
	})
	for _, m := range append(slices.Concat(all...), measureNode(layers, now)...) {
		subject := &Subject{Labels: m.labels}
		m.samples(func(i int, value uint64, labels []string) { put(m.sample(i, value, labels, subject)) })
	}
}

func (m *measured) sample(i int, value uint64, labels []string, subject *Subject) Sample {
	x := &metrics[i]
	out := Sample{Descriptor: i, Value: float64(value), At: m.measuredAt(x), Own: labels, Subject: subject}
	if x.nanos {
		out.Value /= float64(time.Second)
	}
	return out
}
