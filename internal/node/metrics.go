package node

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
)

// Reasons for a look at everything.
const (
	resyncConnect  = "connect"  // a connection to the engine was made
	resyncPeriodic = "periodic" // the time has come
	resyncReload   = "reload"   // somebody asked for it
	resyncMissed   = "missed"   // an event could not be read
)

// viewMetrics are the figures of the view's work. Its size is read from it when somebody asks.
type viewMetrics struct {
	lag     prometheus.Histogram
	resyncs *prometheus.CounterVec // by reason

	mu      sync.Mutex
	pending map[model.ContainerID]time.Time // the engine's time of the first event that no look has followed yet, by container; "" for images
}

func newViewMetrics() *viewMetrics {
	m := &viewMetrics{
		lag: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "cri_dockerd_event_lag_seconds", Help: "Time from the engine's event until the view shows what it has changed.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5, 30},
		}),
		resyncs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_resyncs_total", Help: "Looks at everything that the engine has, by reason (connect, periodic, reload, missed).",
		}, []string{"reason"}),
		pending: map[model.ContainerID]time.Time{},
	}
	for _, r := range []string{resyncConnect, resyncPeriodic, resyncReload, resyncMissed} {
		m.resyncs.WithLabelValues(r)
	}
	return m
}

// resync is a look at everything. With a new connection begins what is waited for.
func (m *viewMetrics) resync(reason string) {
	m.resyncs.WithLabelValues(reason).Inc()
	if reason == resyncConnect {
		m.mu.Lock()
		defer m.mu.Unlock()
		clear(m.pending)
	}
}

// noted is an event that has come.
func (m *viewMetrics) noted(e engine.Event) {
	if e.At.IsZero() || e.Kind == engine.Killed { // no inspect follows
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.pending[e.ID]; !ok {
		m.pending[e.ID] = e.At
	}
}

// looking is called when a look at a container begins, or at the images (""); seen when the view has what it found.
func (m *viewMetrics) looking(id model.ContainerID) (seen func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at, ok := m.pending[id]
	if !ok {
		return func() {}
	}
	delete(m.pending, id)
	return func() { m.lag.Observe(max(time.Since(at), 0).Seconds()) }
}

// Collectors are the figures of the view, to be registered once.
func (v *View) Collectors() []prometheus.Collector {
	return []prometheus.Collector{v.metrics.lag, v.metrics.resyncs, size{v}}
}

// size is how much the view holds.
type size struct{ view *View }

func sizes() (sandboxes, containers, images *prometheus.Desc) {
	return prometheus.NewDesc("cri_dockerd_sandboxes", "Sandboxes, by state (ready, notready).", []string{"state"}, nil),
		prometheus.NewDesc("cri_dockerd_containers", "Containers of pods, by state (created, running, exited, unknown).", []string{"state"}, nil),
		prometheus.NewDesc("cri_dockerd_images", "Images that the engine has.", nil, nil)
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
		runtimeapi.ContainerState_CONTAINER_CREATED: "created", runtimeapi.ContainerState_CONTAINER_RUNNING: "running",
		runtimeapi.ContainerState_CONTAINER_EXITED: "exited", runtimeapi.ContainerState_CONTAINER_UNKNOWN: "unknown",
	} {
		gauge(containers, states[state], name)
	}
	if list, err := s.view.Images(); err == nil {
		gauge(images, len(list))
	}
}
