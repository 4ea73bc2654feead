package podstats

import (
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/wire"
)

// MetricDescriptors describes all metrics with their labels (KEP-2371), always in the same order.
func MetricDescriptors() []*runtimeapi.MetricDescriptor {
	var out []*runtimeapi.MetricDescriptor
	for d := range Descriptors() {
		out = append(out, &runtimeapi.MetricDescriptor{
			Name:      d.Name,
			Help:      d.Help,
			LabelKeys: d.Labels,
		})
	}

	return out
}

// Metrics reads the metrics of all running pods (KEP-2371). It returns PodSandboxMetrics as encoded
// items of a list, in no order; see package wire. Containers that end meanwhile are omitted. The
// CRI's values are integers, so seconds are rounded down.
func (r *Reporter) Metrics() []byte {
	now, pods := time.Now(), r.runningPods(r.View.Sandboxes())
	layers := r.fsLayers(pods)
	var mu sync.Mutex // guards items
	items := wire.NewBuffer(int(r.metricsSize.Load()))
	inParallel(pods, func(p runningPod) struct{} {
		e := encoders.Get().(*encoder)
		defer encoders.Put(e)

		e.pod = wire.AppendText(e.pod[:0], podSandboxID, string(p.ID))
		all := r.measurePod(p, maxInterfaces(len(pods)), now)
		if p.ID == pods[0].ID { // the CRI has no other place for the node's metrics
			all = append(all, measureNode(layers, now)...)
		}

		for _, m := range all {
			e.pod = e.appendMetrics(e.pod, m)
		}

		for _, c := range p.containers {
			if m := r.measureContainer(p.Sandbox, c, layers, now); m != nil {
				e.container = e.appendMetrics(wire.AppendText(e.container[:0], containerID, string(c.ID)), m)
				e.pod = wire.AppendField(e.pod, podContainers, e.container)
			}
		}

		mu.Lock()
		defer mu.Unlock()

		items = wire.AppendField(items, wire.Items, e.pod)

		return struct{}{}
	})

	r.metricsSize.Store(int64(len(items)))

	return items
}

// Fields of api.proto: those of PodSandboxMetrics, of ContainerMetrics, and of Metric.
const (
	podSandboxID  wire.Field = 1
	podContainers wire.Field = 3

	containerID wire.Field = 1

	subjectMetrics wire.Field = 2 // of both

	metricName      wire.Field = 1
	metricTimestamp wire.Field = 2
	metricType      wire.Field = 3
	metricLabel     wire.Field = 4
	metricValue     wire.Field = 5
)

// metricHeads contains the constant fields of each metric.
var metricHeads = func() (out [][]byte) {
	for _, x := range metrics {
		b := wire.AppendText(nil, metricName, x.name)
		if x.isGauge {
			b = wire.AppendNumber(b, metricType, uint64(runtimeapi.MetricType_GAUGE))
		}
		out = append(out, b)
	}

	return out
}()

// encoder contains reusable memory.
type encoder struct{ pod, container, metric, labels []byte }

var encoders = sync.Pool{New: func() any { return &encoder{} }}

// appendMetrics appends the CRI metrics of a subject.
func (e *encoder) appendMetrics(b []byte, m *measured) []byte {
	e.labels = e.labels[:0]
	for _, l := range m.labels {
		e.labels = wire.AppendText(e.labels, metricLabel, l)
	}

	m.report(func(i int, value uint64, labels []string) {
		x := &metrics[i]
		e.metric = append(append(e.metric[:0], metricHeads[i]...), e.labels...)
		for _, l := range labels {
			e.metric = wire.AppendText(e.metric, metricLabel, l)
		}

		if at := m.measuredAt(x); !at.IsZero() {
			e.metric = wire.AppendNumber(e.metric, metricTimestamp, uint64(at.UnixNano()))
		}
		if x.isNanos {
			value /= uint64(time.Second)
		}

		e.metric = wire.AppendWrapped(e.metric, metricValue, value)
		b = wire.AppendField(b, subjectMetrics, e.metric)
	})

	return b
}
