package podnet

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"cri-dockerd/internal/secret"
)

// Observer records metrics and traces of CNI plugins.
type Observer struct {
	seconds *prometheus.HistogramVec // by command and plugin
	errors  *prometheus.CounterVec   // by command and plugin
	tracer  trace.Tracer
}

// NewObserver returns an Observer. Each command of a plugin gets a span from traces; nil disables
// tracing.
func NewObserver(traces trace.TracerProvider) *Observer {
	if traces == nil {
		traces = noop.NewTracerProvider()
	}

	labels := []string{"command", "plugin"}

	return &Observer{
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "cri_dockerd_cni_duration_seconds",
			Help:    "Duration of CNI commands (ADD, DEL, …) by command and plugin, excluding the wait for a slot.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
		}, labels),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_cni_errors_total",
			Help: "Failed commands of CNI plugins, by command and plugin.",
		}, labels),
		tracer: traces.Tracer("cri-dockerd/podnet"),
	}
}

// Collectors returns the metrics of plugins, to be registered once.
func (o *Observer) Collectors() []prometheus.Collector {
	return []prometheus.Collector{o.seconds, o.errors}
}

// begin records the start of a plugin with an environment (CNI specification, section 2,
// "Parameters"). The caller passes the plugin's error to end. The operator chooses the plugins and
// there are few, so the labels are bounded.
func (o *Observer) begin(ctx context.Context, path string, environ []string) (_ context.Context, end func(err error)) {
	if o == nil {
		return ctx, func(error) {}
	}

	command, plugin, began := parameter(environ, "CNI_COMMAND"), filepath.Base(path), time.Now()
	ctx, span := o.tracer.Start(ctx, "CNI "+command+" "+plugin)
	if span.IsRecording() {
		span.SetAttributes(attribute.String("cni.command", command), attribute.String("cni.plugin", plugin),
			attribute.String("cni.container_id", parameter(environ, "CNI_CONTAINERID")))
	}

	return ctx, func(err error) {
		o.seconds.WithLabelValues(command, plugin).Observe(time.Since(began).Seconds())
		failed := o.errors.WithLabelValues(command, plugin)
		if err != nil {
			failed.Inc()
			span.SetStatus(codes.Error, secret.Mask(err.Error()))
		}
		span.End()
	}
}

// parameter returns the last value of an environment variable, like exec.
func parameter(environ []string, name string) string {
	for i := len(environ) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(environ[i], name+"="); ok {
			return v
		}
	}
	return ""
}
