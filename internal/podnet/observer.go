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

// Observer counts and traces what CNI plugins do.
type Observer struct {
	seconds *prometheus.HistogramVec // by command and plugin
	errors  *prometheus.CounterVec   // the same
	tracer  trace.Tracer
}

// NewObserver returns an observer; traces gets a span for each command of each plugin, nil for
// none.
func NewObserver(traces trace.TracerProvider) *Observer {
	if traces == nil {
		traces = noop.NewTracerProvider()
	}

	labels := []string{"command", "plugin"}

	return &Observer{
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "cri_dockerd_cni_duration_seconds",
			Help:    "Time of CNI plugins, by command (ADD, DEL, …) and plugin, without the wait for their turn.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
		}, labels),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cri_dockerd_cni_errors_total", Help: "Commands that CNI plugins have failed, by command and plugin.",
		}, labels),
		tracer: traces.Tracer("cri-dockerd/podnet"),
	}
}

// Collectors are the figures of plugins, to be registered once.
func (o *Observer) Collectors() []prometheus.Collector {
	return []prometheus.Collector{o.seconds, o.errors}
}

// begin notes that a plugin is started with an environment (CNI specification, section 2,
// "Parameters"); end is to be called with its error. Plugins are an operator's choice and few,
// which bounds the labels.
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

// parameter is the last value of a variable, as exec has it.
func parameter(environ []string, name string) string {
	for i := len(environ) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(environ[i], name+"="); ok {
			return v
		}
	}
	return ""
}
