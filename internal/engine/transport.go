package engine

import (
	"context"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/client"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

// newCallMetrics returns the histogram of engine requests by operation and code.
func newCallMetrics() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "cri_dockerd_engine_request_duration_seconds",
		Help: "Time until the response header of a request to Docker Engine, by operation and HTTP status code " +
			"(error: no response).",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
	}, []string{"operation", "code"})
}

// withObservation configures tracing and metrics of Docker's client, which contains otelhttp. Spans
// go to traces, which may be nil. The header traceparent carries the caller's context. Durations of
// requests go to the histogram calls.
func withObservation(traces trace.TracerProvider, calls *prometheus.HistogramVec) client.Opt {
	if traces == nil {
		traces = tracenoop.NewTracerProvider()
	}

	return client.WithTraceOptions(
		otelhttp.WithTracerProvider(traces),
		otelhttp.WithPropagators(propagation.TraceContext{}),
		otelhttp.WithSpanNameFormatter(func(_ string, r *http.Request) string {
			return operation(r.Method, r.URL.Path)
		}),
		otelhttp.WithMeterProvider(meters{calls: calls}),
		//nolint:staticcheck // its replacement, Labeler, does not exist for clients
		otelhttp.WithMetricAttributesFn(func(r *http.Request) []attribute.KeyValue {
			return []attribute.KeyValue{operationKey.String(operation(r.Method, r.URL.Path))}
		}),
	)
}

const (
	operationKey = attribute.Key("docker.operation")
	// https://opentelemetry.io/docs/specs/semconv/http/http-metrics/
	statusKey   = attribute.Key("http.response.status_code")
	requestTime = "http.client.request.duration" // in seconds
)

// meters implements the part of OpenTelemetry's metric API used by otelhttp for request durations.
// It writes to a Prometheus histogram and does not need the SDK.
type meters struct {
	metricnoop.MeterProvider
	calls *prometheus.HistogramVec
}

type meter struct {
	metricnoop.Meter
	calls *prometheus.HistogramVec
}

type requestTimes struct {
	metricnoop.Float64Histogram
	calls *prometheus.HistogramVec
}

// Meter implements metric.MeterProvider.
func (m meters) Meter(string, ...metric.MeterOption) metric.Meter { return meter{calls: m.calls} }

// Float64Histogram implements metric.Meter.
func (m meter) Float64Histogram(name string, o ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	if name == requestTime {
		return requestTimes{calls: m.calls}, nil
	}
	return m.Meter.Float64Histogram(name, o...)
}

// Record implements metric.Float64Histogram.
func (h requestTimes) Record(_ context.Context, seconds float64, o ...metric.RecordOption) {
	set := metric.NewRecordConfig(o).Attributes()
	code := "error"
	if v, ok := set.Value(statusKey); ok {
		code = strconv.FormatInt(v.AsInt64(), 10)
	}
	op, _ := set.Value(operationKey)
	h.calls.WithLabelValues(op.AsString(), code).Observe(seconds)
}

// Enabled implements metric.Float64Histogram.
func (requestTimes) Enabled(context.Context) bool { return true }

// Path elements of Docker's routes. All other elements are names or IDs.
var (
	routeKinds = []string{"containers", "exec", "images", "events", "info", "version", "_ping", "plugins", "system",
		"volumes", "networks"}
	routeVerbs = []string{
		"json", "create", "load", "start", "stop", "kill", "update", "rename", "attach", "wait", "resize", "exec",
		"logs", "top", "stats", "history", "tag", "get", "archive", "prune", "restart", "pause", "unpause",
	}
)

// operation returns the method and route of a request without version, names and IDs: "POST
// /containers/{id}/start". The number of distinct operations is bounded for any image names.
func operation(method, path string) string {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	for i, p := range parts { // skip the prefix of a proxy, and the version
		if slices.Contains(routeKinds, p) && (i == 0 || isVersion(parts[i-1]) || i == len(parts)-1) {
			parts = parts[i:]
			break
		}
	}

	if !slices.Contains(routeKinds, parts[0]) {
		return method + " other"
	}

	route := method + " /" + parts[0]
	rest := parts[1:]
	if len(rest) == 0 {
		return route
	}

	last, verb := rest[len(rest)-1], ""
	if method != http.MethodDelete && slices.Contains(routeVerbs, last) {
		verb, rest = "/"+last, rest[:len(rest)-1]
	}
	if len(rest) > 0 {
		route += "/{id}"
	}

	return route + verb
}

// isVersion reports whether a path element is an API version such as v1.41.
func isVersion(part string) bool {
	return len(part) > 1 && part[0] == 'v' && part[1] >= '0' && part[1] <= '9'
}
