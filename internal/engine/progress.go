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

// pullMetrics are the figures of all pulls of an engine.
type pullMetrics struct {
	active  prometheus.Gauge
	bytes   *prometheus.CounterVec   // by phase
	seconds *prometheus.HistogramVec // by result
}

func newPullMetrics() pullMetrics {
	m := pullMetrics{
		active: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cri_dockerd_image_pulls_active",
			Help: "Pulls of images that are under way.",
		}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_image_pull_bytes_total",
			Help: "Compressed bytes of layers that pulls have moved, by phase (downloading, extracting), as the " +
				"engine reports them.",
		}, []string{"phase"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "cri_dockerd_image_pull_duration_seconds",
			Help:    "Time of pulls, by result (ok, error).",
			Buckets: []float64{.1, .5, 1, 5, 10, 30, 60, 120, 300, 900},
		}, []string{"result"}),
	}

	for _, phase := range []string{downloading, extracting} {
		m.bytes.WithLabelValues(phase)
	}

	return m
}

// Collectors are the figures of requests and pulls, to be registered once.
func (e *Engine) Collectors() []prometheus.Collector {
	return []prometheus.Collector{e.calls, e.metrics.active, e.metrics.bytes, e.metrics.seconds}
}

// Phases of a layer in the engine's words, in lower case.
const (
	pullingFrom      = "pulling from " // with the image's tag in the place of the layer
	announced        = "pulling fs layer"
	waiting          = "waiting"
	downloading      = "downloading"
	downloadComplete = "download complete"
	extracting       = "extracting"
	pullComplete     = "pull complete"
	alreadyExists    = "already exists"
)

// maxLayers is how many layers of an image are followed. Engines make images of 127 at most.
const maxLayers = 1024

// reportEvery is how often the debug log tells of a pull that is under way.
const reportEvery = 5 * time.Second

// progress follows one pull by the messages that the engine sends. One goroutine uses it.
type progress struct {
	dog     *watchdog
	log     *slog.Logger
	metrics pullMetrics
	began   time.Time
	told    time.Time
	layers  map[string]*layerProgress
}

type layerProgress struct {
	status         string // the last, in lower case
	phase          string
	current, total int64 // bytes of the phase
}

func newProgress(dog *watchdog, log *slog.Logger, m pullMetrics) *progress {
	now := time.Now()
	m.active.Inc()
	return &progress{dog: dog, log: log, metrics: m, began: now, told: now, layers: map[string]*layerProgress{}}
}

// end counts the pull.
func (p *progress) end(err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	p.metrics.active.Dec()
	p.metrics.seconds.WithLabelValues(result).Observe(time.Since(p.began).Seconds())
}

// saw takes the engine's next message. With the containerd store the only word of a layer that is
// being extracted are the seconds that it takes; they count, since a large layer may take longer
// than any deadline.
func (p *progress) saw(m jsonstream.Message) {
	m.ID, m.Status = text.Clean(m.ID, text.MaxName), text.Clean(m.Status, text.MaxName)
	state := m.Status
	if m.Progress != nil {
		state = fmt.Sprintf("%s, %d of %d", m.Status, m.Progress.Current, m.Progress.Total)
	}

	p.count(m)
	p.dog.saw(m.ID, state, p.turn())
	if time.Since(p.told) >= reportEvery {
		p.told = time.Now()
		p.report()
	}
}

// count adds what a layer has moved since its last message.
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
		if d := m.Progress; d != nil && d.Units == "" { // with the containerd store extraction is told in seconds
			l.total = d.Total
			p.add(l, d.Current)
		}

	case downloadComplete, pullComplete:
		p.add(l, l.total)
		l.phase, l.total = phase, 0
	}
}

// turn says what the pull waits for. A layer that was only announced is connecting to its registry
// or, with containerd's image store, in the queue.
func (p *progress) turn() turn {
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
		return turnUnknown
	case len(statuses) == 1 && statuses[waiting]:
		return turnQueued
	}

	return turnCame
}

func (p *progress) add(l *layerProgress, current int64) {
	if current > l.current {
		p.metrics.bytes.WithLabelValues(l.phase).Add(float64(current - l.current))
	}
	l.current = current // a download that begins again goes back
}

func (p *progress) report() {
	var down, of int64
	phases := map[string]int{}
	for id, l := range p.layers {
		if id == "" || l.phase == "" {
			continue
		}
		phases[l.phase]++
		if l.phase == downloading {
			down, of = down+l.current, of+l.total
		}
	}

	p.log.Debug("pull goes on", "layers", phases, "bytes", down, "of", of, "for",
		time.Since(p.began).Round(time.Second))
}
