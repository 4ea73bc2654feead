package cri

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/stats"
)

// ListMetricDescriptors names all metrics with their labels (CRI ListMetricDescriptors, KEP-2371). They are the same at all times, so it answers
// also while the engine is down: the kubelet asks once.
func (s *Service) ListMetricDescriptors(_ context.Context, r *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	if err := spec.Validate(r); err != nil {
		return nil, err
	}
	resp := &runtimeapi.ListMetricDescriptorsResponse{}
	for d := range Metrics() {
		resp.Descriptors = append(resp.Descriptors, &runtimeapi.MetricDescriptor{Name: d.Name, Help: d.Help, LabelKeys: d.Labels})
	}
	return resp, nil
}

// ListPodSandboxMetrics reads the metrics of everything that runs (CRI ListPodSandboxMetrics, KEP-2371). What ends meanwhile is left out. The CRI's
// values are whole numbers, so seconds are rounded down.
func (s *Service) ListPodSandboxMetrics(_ context.Context, r *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	host, err := s.begin(r)
	if err != nil {
		return nil, err
	}
	now, layers := time.Now(), s.fsLayers(host)
	return &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: sideBySide(s.runningPods(s.View.Sandboxes()), func(p runningPod) *runtimeapi.PodSandboxMetrics {
		out := &runtimeapi.PodSandboxMetrics{PodSandboxId: p.ID}
		for _, m := range s.measurePod(p, now) {
			out.Metrics = append(out.Metrics, m.forCRI()...)
		}
		for _, c := range p.containers {
			if m := s.measureContainer(p.Sandbox, c, layers, now); m != nil {
				out.ContainerMetrics = append(out.ContainerMetrics, &runtimeapi.ContainerMetrics{ContainerId: c.ID, Metrics: m.forCRI()})
			}
		}
		return out
	})}, nil
}

// perSubject is about how many figures one subject has, and so many of them are allocated at once.
const (
	perSubject = 48
	together   = 16
)

// cell is a metric with its value, since there are many and each would be allocated twice.
type cell struct {
	metric runtimeapi.Metric
	value  runtimeapi.UInt64Value
}

// forCRI are the figures as the CRI has them.
func (m *measured) forCRI() []*runtimeapi.Metric {
	var cells []cell
	out := make([]*runtimeapi.Metric, 0, perSubject)
	m.samples(func(i int, value uint64, labels []string) {
		x := &metrics[i]
		if len(cells) == 0 {
			cells = make([]cell, together)
		}
		c := &cells[0]
		cells = cells[1:]
		if x.nanos {
			value /= uint64(time.Second)
		}
		c.value.Value = value
		c.metric.Name, c.metric.LabelValues, c.metric.Value = x.name, m.labels, &c.value
		if len(labels) > 0 {
			c.metric.LabelValues = append(m.labels[:len(m.labels):len(m.labels)], labels...)
		}
		if x.gauge {
			c.metric.MetricType = runtimeapi.MetricType_GAUGE
		}
		if x.measuredBefore {
			c.metric.Timestamp = m.layer.at.UnixNano()
		}
		out = append(out, &c.metric)
	})
	return out
}

// fsLayers are the writable layers as last measured, with their file system as it is.
type fsLayers struct {
	layers
	fs *stats.FileSystem // nil while nothing is measured
}

func (s *Service) fsLayers(host spec.Host) fsLayers {
	l := fsLayers{layers: s.layers(host)}
	if l.ContainerDir == "" {
		return l
	}
	if fs, err := s.Stats.FileSystem(l.ContainerDir); err == nil {
		l.fs = &fs
	}
	return l
}

// measurePod reads a pod as a whole: its control group, if it has one of its own, and its network, if it is not the node's.
func (s *Service) measurePod(p runningPod, now time.Time) (out []*measured) {
	namespace, name := p.Metadata.GetNamespace(), p.Metadata.GetName()
	d, err := s.Stats.PodDetails(p.anchor, p.pid, p.Metadata.GetUid())
	if err == nil {
		out = append(out, &measured{labels: []string{"", d.Path, "", "", namespace, name}, now: now, details: &d, device: s.Stats.Device})
	} else if !errors.Is(err, stats.ErrNoPodGroup) {
		s.unreadable("sandbox", p.ID, err)
	}
	m := &measured{labels: []string{podContainer, s.Stats.Path(p.anchor, p.pid), p.Image, p.Name, namespace, name}, now: now, start: p.CreatedAt}
	if !p.HostNetwork() {
		if m.network, err = s.Stats.Network(p.pid); err != nil {
			s.unreadable("sandbox", p.ID, err)
		}
	}
	return append(out, m)
}

// podContainer is how cAdvisor names the container that stands for a pod, with Docker.
const podContainer = "POD"

// measureContainer reads a container, nil if it has ended.
func (s *Service) measureContainer(sb *spec.Sandbox, c *spec.Container, l fsLayers, now time.Time) *measured {
	d, err := s.Stats.ContainerDetails(c.ID, c.Pid)
	if err != nil {
		s.unreadable("container", c.ID, err)
		return nil
	}
	m := &measured{
		labels: []string{c.Metadata.GetName(), d.Path, c.Image, c.Name, sb.Metadata.GetNamespace(), sb.Metadata.GetName()},
		now:    now, start: c.StartedAt, details: &d, container: c, device: s.Stats.Device,
	}
	if p, err := s.Stats.Descriptors(c.ID, c.Pid); err == nil {
		m.processes = &p
	}
	if w, known := s.writable(c, l.layers); known && l.fs != nil {
		m.layer = &layer{bytes: w.Bytes, at: l.At, fs: *l.fs}
	}
	if c.LogPath != "" {
		if n, err := s.Stats.LogBytes(c.LogPath); err == nil {
			m.logBytes = &n
		}
	}
	return m
}

// writable is what a container's writable layer has been measured to take.
func (s *Service) writable(c *spec.Container, l layers) (imagefs.Usage, bool) {
	if len(l.Writable) == 0 {
		return imagefs.Usage{}, false
	}
	w, known := l.Writable[s.Stats.WritableLayer(c.ID, c.Pid, l.base)]
	return w, known
}

// unreadable says why figures are missing, unless it is that their process has ended.
func (s *Service) unreadable(kind, id string, err error) {
	if !errdefs.IsNotFound(err) {
		s.Log.Debug("figures cannot be read", kind, id, "err", err)
	}
}
