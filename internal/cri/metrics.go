package cri

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/stats"
	"cri-dockerd/internal/wire"
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
// values are whole numbers, so seconds are rounded down. The items are encoded already; see package wire.
func (s *Service) ListPodSandboxMetrics(_ context.Context, r *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	items, err := s.podMetrics(r)
	if err != nil {
		return nil, err
	}
	return wire.Carry(&runtimeapi.ListPodSandboxMetricsResponse{}, items), nil
}

// podMetrics are the metrics of each pod that runs, as items of a list in no order.
func (s *Service) podMetrics(req any) ([]byte, error) {
	host, err := s.begin(req)
	if err != nil {
		return nil, err
	}
	now, pods := time.Now(), s.runningPods(s.View.Sandboxes())
	layers := s.fsLayers(host, pods)
	var mu sync.Mutex // guards items
	items := wire.Room(int(s.metricsSize.Load()))
	sideBySide(pods, func(p runningPod) struct{} {
		e := encoders.Get().(*encoder)
		defer encoders.Put(e)
		e.pod = wire.AppendText(e.pod[:0], podSandboxID, string(p.ID))
		all := s.measurePod(p, maxInterfaces(len(pods)), now)
		if p.ID == pods[0].ID { // the CRI has no other place for what is the node's
			all = append(all, measureNode(layers, now)...)
		}
		for _, m := range all {
			e.pod = e.metrics(e.pod, m)
		}
		for _, c := range p.containers {
			if m := s.measureContainer(p.Sandbox, c, layers, now); m != nil {
				e.container = e.metrics(wire.AppendText(e.container[:0], containerID, string(c.ID)), m)
				e.pod = wire.AppendField(e.pod, podContainers, e.container)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		items = wire.AppendField(items, wire.Items, e.pod)
		return struct{}{}
	})
	s.metricsSize.Store(int64(len(items)))
	return items, nil
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

// metricHeads are those fields of metrics that are always the same.
var metricHeads = func() (out [][]byte) {
	for _, x := range metrics {
		b := wire.AppendText(nil, metricName, x.name)
		if x.gauge {
			b = wire.AppendNumber(b, metricType, uint64(runtimeapi.MetricType_GAUGE))
		}
		out = append(out, b)
	}
	return out
}()

// encoder has memory that is used again and again.
type encoder struct{ pod, container, metric, labels []byte }

var encoders = sync.Pool{New: func() any { return &encoder{} }}

// metrics appends the figures of a subject as the CRI has them.
func (e *encoder) metrics(b []byte, m *measured) []byte {
	e.labels = e.labels[:0]
	for _, l := range m.labels {
		e.labels = wire.AppendText(e.labels, metricLabel, l)
	}
	m.samples(func(i int, value uint64, labels []string) {
		x := &metrics[i]
		e.metric = append(append(e.metric[:0], metricHeads[i]...), e.labels...)
		for _, l := range labels {
			e.metric = wire.AppendText(e.metric, metricLabel, l)
		}
		if at := m.measuredAt(x); !at.IsZero() {
			e.metric = wire.AppendNumber(e.metric, metricTimestamp, uint64(at.UnixNano()))
		}
		if x.nanos {
			value /= uint64(time.Second)
		}
		e.metric = wire.AppendWrapped(e.metric, metricValue, value)
		b = wire.AppendField(b, subjectMetrics, e.metric)
	})
	return b
}

// fsLayers are the writable layers as last measured, with their file system as it is now.
type fsLayers struct {
	imagefs.Figures
	fs *stats.FileSystem // nil if it cannot be read
}

// fsLayers returns the writable layers of all containers of these pods, also of those that have been
// started since the last measurement, so that a first scrape is complete. Where the layout of the
// engine's store is not known, its directory stands for the file system.
func (s *Service) fsLayers(host spec.Host, pods []runningPod) fsLayers {
	var running []model.ContainerID
	for _, p := range pods {
		for _, c := range p.containers {
			running = append(running, c.ID)
		}
	}
	f, known := s.ImageFS.Complete(storeOf(host), running)
	if !known {
		f.ContainerDir = host.RootDir
	}
	l := fsLayers{Figures: f}
	if fs, err := s.Stats.FileSystem(l.ContainerDir); err == nil {
		l.fs = &fs
	}
	return l
}

// measureNode returns the file system of the writable layers, as cAdvisor has it of its root.
func measureNode(l fsLayers, now time.Time) []*measured {
	if l.fs == nil {
		return nil
	}
	return []*measured{{labels: []string{"", "/", "", "", "", ""}, now: now, node: l.fs}}
}

// measurePod reads a pod as a whole: its control group, if it has one of its own, and its network, if it is not the node's.
func (s *Service) measurePod(p runningPod, interfaces int, now time.Time) (out []*measured) {
	namespace, name := p.Metadata.GetNamespace(), p.Metadata.GetName()
	d, err := s.Stats.PodDetails(p.anchor, p.pid, p.Metadata.GetUid())
	if err == nil {
		out = append(out, &measured{labels: []string{"", d.Path, "", "", namespace, name}, now: now, details: &d, device: s.Stats.Device})
	} else if !errors.Is(err, stats.ErrNoPodGroup) {
		s.unreadable("sandbox", string(p.ID), err)
	}
	m := &measured{labels: []string{podContainer, s.Stats.Path(p.anchor, p.pid), p.Image, p.Name, namespace, name}, now: now, start: p.CreatedAt}
	if !p.HostNetwork() {
		if m.network, err = s.Stats.Network(p.anchor, p.pid, interfaces); err != nil {
			s.unreadable("sandbox", string(p.ID), err)
		}
	}
	return append(out, m)
}

// podContainer is how cAdvisor names the container that stands for a pod, with Docker.
const podContainer = "POD"

// measureContainer reads a container, nil if it has ended.
func (s *Service) measureContainer(sb *spec.Sandbox, c *spec.Container, l fsLayers, now time.Time) *measured {
	d, err := s.Stats.ContainerDetails(string(c.ID), c.Pid)
	if err != nil {
		s.unreadable("container", string(c.ID), err)
		return nil
	}
	m := &measured{
		labels: []string{c.Metadata.GetName(), d.Path, c.Image, c.Name, sb.Metadata.GetNamespace(), sb.Metadata.GetName()},
		now:    now, start: c.StartedAt, details: &d, container: c, device: s.Stats.Device,
	}
	if p, err := s.Stats.Descriptors(string(c.ID), c.Pid); err == nil {
		m.processes = &p
	}
	if w, known := l.Writable[c.ID]; known && l.fs != nil {
		m.layer = &layer{bytes: w.Bytes, at: l.At, fs: *l.fs}
	}
	if c.LogPath != "" {
		if n, err := s.Stats.LogBytes(string(c.ID), c.LogPath); err == nil {
			m.logBytes = &n
		}
	}
	return m
}

// unreadable says why figures are missing, unless it is that their process has ended.
func (s *Service) unreadable(kind, id string, err error) {
	if !errdefs.IsNotFound(err) {
		s.Log.Debug("figures cannot be read", kind, id, "err", err)
	}
}
