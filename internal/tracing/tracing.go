// Package tracing sends OpenTelemetry traces to a collector over OTLP. Who traces gets a
// trace.TracerProvider from here; the parts know nothing of where spans go.
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

// flushDeadline is for what has not been sent yet when the daemon stops.
const flushDeadline = 2 * time.Second

// million is the denominator of the sampling rate, as the kubelet's samplingRatePerMillion has it.
const million = 1e6

// Config says where spans go, and which.
type Config struct {
	// host:port of an OTLP collector that speaks gRPC without TLS, as the kubelet's
	// tracing.endpoint
	Endpoint string
	// of calls whose caller traces nothing, how many are traced; the others follow their caller
	PerMillion int
	Node       string // this machine's name
	Version    string // of this program
	Log        *slog.Logger
}

// Provider makes spans and sends them in batches.
type Provider struct {
	*trace.TracerProvider
	exporter trace.SpanExporter
	end      context.Context //nolint:containedctx // for Close, which has none
}

// New returns a provider, which must be closed; ctx must live until then. It connects when there is
// something to send; while nobody listens, spans are dropped and the log says so once in a while.
func New(ctx context.Context, cfg Config) (*Provider, error) {
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(cfg.Endpoint), otlptracegrpc.WithInsecure())
	if err != nil {
		return nil, fmt.Errorf("--tracing-endpoint %s: %w", cfg.Endpoint, err)
	}

	otel.SetErrorHandler(newComplaints(cfg.Log, cfg.Endpoint)) // the exporter has no other way to say that it fails

	return &Provider{
		end:      ctx,
		exporter: exporter,
		TracerProvider: trace.NewTracerProvider(
			trace.WithBatcher(exporter),
			trace.WithSampler(trace.ParentBased(trace.TraceIDRatioBased(float64(cfg.PerMillion)/million))),
			trace.WithResource(resource.NewSchemaless(
				// https://opentelemetry.io/docs/specs/semconv/resource/
				attribute.String("service.name", "cri-dockerd"), attribute.String("service.version", cfg.Version),
				attribute.String("host.name", cfg.Node))),
		),
	}, nil
}

// Close sends what is left, for a moment, and ends.
func (p *Provider) Close() error {
	ctx, cancel := context.WithTimeout(p.end, flushDeadline)
	defer cancel()
	err := p.Shutdown(ctx)
	return errors.Join(err, p.exporter.Shutdown(ctx)) // breaks off what is still being tried
}
