package daemon

import (
	"context"
	"os"
	"strings"

	"go.opentelemetry.io/otel/trace"

	"cri-dockerd/internal/config"
	"cri-dockerd/internal/tracing"
)

// trace makes the provider of spans, nil without --tracing-endpoint: what does not trace has nothing to pay for it.
func (p *parts) trace(cfg *config.Config, version string) (trace.TracerProvider, error) {
	if cfg.TracingEndpoint == "" {
		return nil, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	p.traces, err = tracing.New(context.Background(), tracing.Config{
		Endpoint: cfg.TracingEndpoint, PerMillion: cfg.TracingRate, Node: name, Version: strings.TrimPrefix(version, "cri-dockerd "), Log: p.log,
	})
	if err != nil {
		return nil, err
	}
	return p.traces, nil
}
