package podstats

import (
	"errors"
	"io/fs"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/stats"
)

// measured is the subject of one set of labels and its readings: a container, a pod's cgroup, a
// pod's network, or the node. A nil part has no metrics.
type measured struct {
	labels []string // values of sharedLabels
	now    time.Time
	start  time.Time // zero for a pod's cgroup, created by the kubelet

	details   *stats.Details
	container *model.Container
	processes *stats.Processes
	network   []stats.Interface
	layer     *layer
	node      *stats.FileSystem // then all other parts are nil
	logBytes  *uint64
	device    func(major, minor uint32) string
}

// layer is the last measurement of a container's writable layer, with the current state of its file
// system.
type layer struct {
	bytes uint64
	at    time.Time
	fs    stats.FileSystem
}

// report calls put with each value: the index of its metric, and the values of the metric's own
// labels.
func (m *measured) report(put func(i int, value uint64, labels []string)) {
	var i int
	each := func(value uint64, labels ...string) { put(i, value, labels) } // once, not for each metric
	for i = range metrics {
		metrics[i].report(m, each)
	}
}

// measuredAt returns the time of a metric's value, zero for now.
func (m *measured) measuredAt(x *metric) time.Time {
	if x.isOfLayer && m.layer != nil {
		return m.layer.at
	}
	return time.Time{}
}

// limits returns the limits of a container, nil for other subjects.
func (m *measured) limits() *runtimeapi.LinuxContainerResources {
	if m.container == nil {
		return nil
	}
	return m.container.Resources.GetLinux()
}

func (m *measured) devices() []cgroup.Device {
	if m.details == nil {
		return nil
	}
	return m.details.Devices
}

// hasNoDiskYet reports whether a container has used no disk yet, so that the kernel has no line for
// it. Pods have the lines of their containers.
func (m *measured) hasNoDiskYet() bool {
	return m.container != nil && m.details != nil && len(m.details.Devices) == 0
}

// fsLayers is the last measurement of the writable layers, with the current state of their file
// system.
type fsLayers struct {
	imagefs.Measurement
	fs *stats.FileSystem // nil if it cannot be read
}

// fsLayers returns the writable layers of all containers of these pods. It also measures containers
// that were started since the last measurement, so that a first scrape is complete. If the layout
// of the engine's store is unknown, it uses the file system of the engine's root directory.
func (r *Reporter) fsLayers(pods []runningPod) fsLayers {
	var running []model.ContainerID
	for _, p := range pods {
		for _, c := range p.containers {
			running = append(running, c.ID)
		}
	}

	host := r.View.Engine().Host
	m, known := r.ImageFS.Complete(storeOf(host), running)
	if !known {
		m.ContainerDir = host.RootDir
	}

	l := fsLayers{Measurement: m}
	if fs, err := r.Details.FileSystem(l.ContainerDir); err == nil {
		l.fs = &fs
	}

	return l
}

// measureNode returns the file system of the writable layers, like cAdvisor for its root.
func measureNode(l fsLayers, now time.Time) []*measured {
	if l.fs == nil {
		return nil
	}
	return []*measured{{labels: []string{"", "/", "", "", "", ""}, now: now, node: l.fs}}
}

// podContainer is cAdvisor's container name for a pod with Docker.
const podContainer = "POD"

// measurePod reads a pod as a whole: its own cgroup, if any, and its network, unless it uses the
// node's.
func (r *Reporter) measurePod(p runningPod, interfaces int, now time.Time) (out []*measured) {
	namespace, name := p.Metadata.GetNamespace(), p.Metadata.GetName()
	d, err := r.Details.PodDetails(p.anchor, p.pid, p.Metadata.GetUid())
	if err == nil {
		out = append(out, &measured{
			labels:  []string{"", d.Path, "", "", namespace, name},
			now:     now,
			details: &d,
			device:  r.Details.Device,
		})
	} else if !errors.Is(err, stats.ErrNoPodGroup) {
		r.logUnreadable("sandbox", string(p.ID), err)
	}

	m := &measured{
		labels: []string{podContainer, r.Details.Path(p.anchor, p.pid), p.Image, p.Name, namespace, name},
		now:    now,
		start:  p.CreatedAt,
	}
	if !p.HostNetwork() {
		if m.network, err = r.Usage.Network(p.anchor, p.pid, interfaces); err != nil {
			r.logUnreadable("sandbox", string(p.ID), err)
		}
	}

	return append(out, m)
}

// measureContainer reads a container, nil if it has ended.
func (r *Reporter) measureContainer(sb *model.Sandbox, c *model.Container, l fsLayers, now time.Time) *measured {
	d, err := r.Details.ContainerDetails(string(c.ID), c.Pid)
	if err != nil {
		r.logUnreadable("container", string(c.ID), err)
		return nil
	}

	pod := sb.Metadata
	m := &measured{
		labels:    []string{c.Metadata.GetName(), d.Path, c.Image, c.Name, pod.GetNamespace(), pod.GetName()},
		now:       now,
		start:     c.StartedAt,
		details:   &d,
		container: c,
		device:    r.Details.Device,
	}

	if p, err := r.Details.Descriptors(string(c.ID), c.Pid); err == nil {
		m.processes = &p
	}

	if w, known := l.Writable[c.ID]; known && l.fs != nil {
		m.layer = &layer{bytes: w.Bytes, at: l.At, fs: *l.fs}
	}

	m.logBytes = r.logBytes(c)

	return m
}

// logBytes returns the disk usage of a container's log: 0 without a log path, or if the kubelet has
// removed the directory of the log, nil if it cannot be read.
func (r *Reporter) logBytes(c *model.Container) *uint64 {
	var n uint64
	if c.LogPath == "" {
		return &n
	}

	n, err := r.Details.LogBytes(string(c.ID), c.LogPath)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil
	}

	return &n
}
