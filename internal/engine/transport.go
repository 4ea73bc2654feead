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

// newCallMetrics are the figures of requests to the engine, by operation and code.
func newCallMetrics() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "cri_dockerd_engine_request_duration_seconds",
		Help: "Time until the engine answers a request, by operation and HTTP status (error: no answer). Of what " +
			"it streams, such as a pull, only the beginning.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
	}, []string{"operation", "code"})
}

// observed has the client's requests traced and counted. Docker's client does both by itself
// (otelhttp), so it is told to whom: spans go to traces (nil for none), with the caller's context
// in the header traceparent, and the requests' times to a histogram.
func observed(traces trace.TracerProvider, calls *prometheus.HistogramVec) client.Opt {
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

// meters is OpenTelemetry's metric API as far as otelhttp tells a request's time through it: into
// Prometheus' histogram, without the SDK.
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

// The words of Docker's routes; what is none of them is a name or an ID.
var (
	routeKinds = []string{"containers", "exec", "images", "events", "info", "version", "_ping", "plugins", "system",
		"volumes", "networks"}
	routeVerbs = []string{
		"json", "create", "load", "start", "stop", "kill", "update", "rename", "attach", "wait", "resize", "exec",
		"logs", "top", "stats", "history",
		"tag", "get", "archive", "prune", "restart", "pause", "unpause",
	}
)

// operation is a request's method with its route, without version, names and IDs: "POST
// /containers/{id}/start". The number of operations is bounded, whatever images are called.
func operation(method, path string) string {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	for i, p := range parts { // a proxy's prefix, and the version
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

// isVersion says whether a part of a path is an API version, v1.41.
func isVersion(part string) bool {
	return len(part) > 1 && part[0] == 'v' && part[1] >= '0' && part[1] <= '9'
}
