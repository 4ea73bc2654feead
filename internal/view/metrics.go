package view

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
)

// Reasons for a full read.
const (
	resyncConnect  = "connect"  // after a connection to the engine
	resyncPeriodic = "periodic" // every resyncPeriod
	resyncReload   = "reload"   // on request
	resyncMissed   = "missed"   // after an unreadable event
)

// viewMetrics counts the work of the view. The number of objects is read from the view on
// collection.
type viewMetrics struct {
	lag     prometheus.Histogram
	resyncs *prometheus.CounterVec // by reason

	mu sync.Mutex
	// unseen holds the time of the first event without a later read, by container; "" is for
	// images.
	unseen map[model.ContainerID]time.Time
}

func newViewMetrics() *viewMetrics {
	m := &viewMetrics{
		lag: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "cri_dockerd_event_lag_seconds",
			Help:    "Time from an event of the engine until the view shows its effect.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5, 30},
		}),
		resyncs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_resyncs_total",
			Help: "Full reads of the engine's objects, by reason (connect, periodic, reload, missed).",
		}, []string{"reason"}),
		unseen: map[model.ContainerID]time.Time{},
	}

	for _, r := range []string{resyncConnect, resyncPeriodic, resyncReload, resyncMissed} {
		m.resyncs.WithLabelValues(r)
	}

	return m
}

// countResync counts a full read. A new connection discards earlier events.
func (m *viewMetrics) countResync(reason string) {
	m.resyncs.WithLabelValues(reason).Inc()
	if reason == resyncConnect {
		m.mu.Lock()
		defer m.mu.Unlock()
		clear(m.unseen)
	}
}

// countEvent records the arrival of an event.
func (m *viewMetrics) countEvent(e engine.Event) {
	if e.At.IsZero() || e.Kind == engine.Killed { // no inspection follows
		return
	}

	m.mu.Lock()
	defer m.mu.Unlock()

	if _, ok := m.unseen[e.ID]; !ok {
		m.unseen[e.ID] = e.At
	}
}

// beginRead records the start of a read of a container, or of the images (""). Call seen when the
// view shows the result.
func (m *viewMetrics) beginRead(id model.ContainerID) (seen func()) {
	m.mu.Lock()
	defer m.mu.Unlock()

	at, ok := m.unseen[id]
	if !ok {
		return func() {}
	}

	delete(m.unseen, id)

	return func() { m.lag.Observe(max(time.Since(at), 0).Seconds()) }
}

// Collectors returns the metrics of the view. Register them once.
func (v *View) Collectors() []prometheus.Collector {
	return []prometheus.Collector{v.metrics.lag, v.metrics.resyncs, size{v}}
}

// size collects the number of objects in the view.
type size struct{ view *View }

func sizes() (sandboxes, containers, images *prometheus.Desc) {
	return prometheus.NewDesc("cri_dockerd_sandboxes", "Sandboxes, by state (ready, notready).", []string{"state"},
			nil),
		prometheus.NewDesc("cri_dockerd_containers", "Containers of pods, by state (created, running, exited, "+
			"unknown).", []string{"state"}, nil),
		prometheus.NewDesc("cri_dockerd_images", "Images of the engine.", nil, nil)
}

// Describe implements prometheus.Collector.
func (s size) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(s, ch) }

// Collect implements prometheus.Collector.
func (s size) Collect(ch chan<- prometheus.Metric) {
	sandboxes, containers, images := sizes()
	pods := map[string]int{"ready": 0, "notready": 0}
	for _, sb := range s.view.Sandboxes() {
		if sb.Running {
			pods["ready"]++
		} else {
			pods["notready"]++
		}
	}

	states := map[runtimeapi.ContainerState]int{}
	for _, c := range s.view.Containers() {
		states[c.State]++
	}

	gauge := func(d *prometheus.Desc, n int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	for state, n := range pods {
		gauge(sandboxes, n, state)
	}

	for state, name := range map[runtimeapi.ContainerState]string{
		runtimeapi.ContainerState_CONTAINER_CREATED: "created",
		runtimeapi.ContainerState_CONTAINER_RUNNING: "running",
		runtimeapi.ContainerState_CONTAINER_EXITED:  "exited",
		runtimeapi.ContainerState_CONTAINER_UNKNOWN: "unknown",
	} {
		gauge(containers, states[state], name)
	}

	if list, err := s.view.Images(); err == nil {
		gauge(images, len(list))
	}
}
