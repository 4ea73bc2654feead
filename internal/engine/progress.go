package engine

import (
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/moby/moby/api/types/jsonstream"
	"github.com/prometheus/client_golang/prometheus"

	"cri-dockerd/internal/text"
)

// pullMetrics are the metrics of all pulls of an engine.
type pullMetrics struct {
	active  prometheus.Gauge
	bytes   *prometheus.CounterVec   // by phase
	seconds *prometheus.HistogramVec // by result
}

func newPullMetrics() pullMetrics {
	m := pullMetrics{
		active: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cri_dockerd_image_pulls_active",
			Help: "Image pulls in progress.",
		}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_image_pull_bytes_total",
			Help: "Compressed layer bytes processed by image pulls, by phase (downloading, extracting), as reported " +
				"by Docker Engine.",
		}, []string{"phase"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "cri_dockerd_image_pull_duration_seconds",
			Help:    "Duration of image pulls, by result (ok, error).",
			Buckets: []float64{.1, .5, 1, 5, 10, 30, 60, 120, 300, 900},
		}, []string{"result"}),
	}

	for _, phase := range []string{downloading, extracting} {
		m.bytes.WithLabelValues(phase)
	}

	return m
}

// Collectors returns the metrics of requests and pulls. They must be registered once.
func (e *Engine) Collectors() []prometheus.Collector {
	return []prometheus.Collector{e.calls, e.metrics.active, e.metrics.bytes, e.metrics.seconds}
}

// Layer statuses in the engine's messages, in lower case.
const (
	pullingFrom      = "pulling from " // with the tag of the image as the layer ID
	announced        = "pulling fs layer"
	waiting          = "waiting"
	downloading      = "downloading"
	downloadComplete = "download complete"
	extracting       = "extracting"
	pullComplete     = "pull complete"
	alreadyExists    = "already exists"
)

// maxLayers bounds the number of tracked layers of an image. Engines build images of up to 127.
const maxLayers = 1024

// logInterval is the interval of debug log entries about a pull in progress.
const logInterval = 5 * time.Second

// progress tracks one pull by the engine's messages. It is not safe for concurrent use.
type progress struct {
	watchdog *watchdog
	log      *slog.Logger
	metrics  pullMetrics
	started  time.Time
	logged   time.Time // of the last log entry
	layers   map[string]*layerProgress
}

type layerProgress struct {
	status         string // last status, in lower case
	phase          string
	current, total int64 // bytes in this phase
}

func newProgress(w *watchdog, log *slog.Logger, m pullMetrics) *progress {
	now := time.Now()
	m.active.Inc()

	return &progress{
		watchdog: w,
		log:      log,
		metrics:  m,
		started:  now,
		logged:   now,
		layers:   map[string]*layerProgress{},
	}
}

// end records the result of the pull.
func (p *progress) end(err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	p.metrics.active.Dec()
	p.metrics.seconds.WithLabelValues(result).Observe(time.Since(p.started).Seconds())
}

// observe processes the engine's next message. During extraction, the containerd store reports only
// the elapsed seconds. They count as progress, because a large layer may take longer than any
// deadline.
func (p *progress) observe(m jsonstream.Message) {
	m.ID, m.Status = text.Clean(m.ID, text.MaxName), text.Clean(m.Status, text.MaxName)
	state := m.Status
	if m.Progress != nil {
		state = fmt.Sprintf("%s, %d of %d", m.Status, m.Progress.Current, m.Progress.Total)
	}

	p.count(m)
	p.watchdog.observe(m.ID, state, p.state())
	if time.Since(p.logged) >= logInterval {
		p.logged = time.Now()
		p.logProgress()
	}
}

// count updates the byte counters from the message of a layer.
func (p *progress) count(m jsonstream.Message) {
	l := p.layers[m.ID]
	if l == nil && len(p.layers) >= maxLayers {
		return
	}

	if l == nil {
		l = &layerProgress{}
		p.layers[m.ID] = l
	}

	l.status = strings.ToLower(m.Status)
	switch phase := l.status; phase {
	case downloading, extracting:
		if phase != l.phase {
			*l = layerProgress{status: phase, phase: phase}
		}
		if d := m.Progress; d != nil && d.Units == "" { // the containerd store reports extraction in seconds
			l.total = d.Total
			p.add(l, d.Current)
		}

	case downloadComplete, pullComplete:
		p.add(l, l.total)
		l.phase, l.total = phase, 0
	}
}

// state derives the state of the pull from the statuses of its layers. An announced layer is
// connecting to the registry or, with containerd's image store, queued.
func (p *progress) state() pullState {
	statuses := map[string]bool{}
	for id, l := range p.layers {
		if id != "" && !strings.HasPrefix(l.status, pullingFrom) {
			statuses[l.status] = true
		}
	}

	for _, done := range []string{downloadComplete, pullComplete, alreadyExists} {
		delete(statuses, done)
	}

	switch {
	case len(statuses) == 0, len(statuses) == 1 && statuses[announced]:
		return pullUnknown
	case len(statuses) == 1 && statuses[waiting]:
		return pullQueued
	}

	return pullActive
}

func (p *progress) add(l *layerProgress, current int64) {
	if current > l.current {
		p.metrics.bytes.WithLabelValues(l.phase).Add(float64(current - l.current))
	}
	l.current = current // a restarted download goes back to 0
}

func (p *progress) logProgress() {
	var downloaded, total int64
	phases := map[string]int{}
	for id, l := range p.layers {
		if id == "" || l.phase == "" {
			continue
		}
		phases[l.phase]++
		if l.phase == downloading {
			downloaded += l.current
			total += l.total
		}
	}

	p.log.Debug("image pull in progress", "layers", phases, "bytes", downloaded, "total", total,
		"elapsed", time.Since(p.started).Round(time.Second))
}
