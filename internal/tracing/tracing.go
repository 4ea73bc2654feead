// Package tracing exports OpenTelemetry traces to a collector over OTLP. The other packages receive
// a trace.TracerProvider and do not depend on the exporter.
package tracing

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
)

// flushTimeout bounds the export of the remaining spans when the daemon stops.
const flushTimeout = 2 * time.Second

// million is the denominator of the sampling rate, as in the kubelet's samplingRatePerMillion.
const million = 1e6

// Config configures a Provider.
type Config struct {
	// Endpoint is the host:port of an OTLP collector (gRPC without TLS), like the kubelet's
	// tracing.endpoint.
	Endpoint string
	// PerMillion is the sampling rate of calls without a trace context. All other calls follow
	// the sampling decision of their caller.
	PerMillion int
	Node       string // host name of this machine
	Version    string // version of this program
	Log        *slog.Logger
}

// Provider creates spans and exports them in batches.
type Provider struct {
	*trace.TracerProvider
	exporter trace.SpanExporter
	ctx      context.Context //nolint:containedctx // for Close, an io.Closer
}

// New returns a provider. The caller must close it, and must not cancel ctx before. The provider
// connects when it has spans to export. While the collector is unavailable, it drops spans and logs
// a warning from time to time.
func New(ctx context.Context, cfg Config) (*Provider, error) {
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(cfg.Endpoint), otlptracegrpc.WithInsecure())
	if err != nil {
		return nil, fmt.Errorf("--tracing-endpoint %s: %w", cfg.Endpoint, err)
	}

	// The exporter reports its failures only to the global error handler.
	otel.SetErrorHandler(newErrorHandler(cfg.Log, cfg.Endpoint))

	return &Provider{
		ctx:      ctx,
		exporter: exporter,
		TracerProvider: trace.NewTracerProvider(
			trace.WithBatcher(exporter),
			trace.WithSampler(trace.ParentBased(trace.TraceIDRatioBased(float64(cfg.PerMillion)/million))),
			trace.WithResource(resource.NewSchemaless(
				// https://opentelemetry.io/docs/specs/semconv/resource/
				attribute.String("service.name", "cri-dockerd"),
				attribute.String("service.version", cfg.Version),
				attribute.String("host.name", cfg.Node),
			)),
		),
	}, nil
}

// Close exports the remaining spans within flushTimeout and stops the provider.
func (p *Provider) Close() error {
	ctx, cancel := context.WithTimeout(p.ctx, flushTimeout)
	defer cancel()

	err := p.Shutdown(ctx)
	return errors.Join(err, p.exporter.Shutdown(ctx)) // cancels exports still in progress
}
