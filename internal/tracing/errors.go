package tracing

import (
	"log/slog"
	"time"

	"golang.org/x/time/rate"
)

// warningInterval is the minimum time between two warnings about lost spans.
const warningInterval = 10 * time.Minute

// errorHandler logs the errors of the OpenTelemetry SDK. It logs at most one warning in each
// warningInterval and the other errors at debug level.
type errorHandler struct {
	log      *slog.Logger
	endpoint string
	warn     rate.Sometimes
}

func newErrorHandler(log *slog.Logger, endpoint string) *errorHandler {
	return &errorHandler{
		log:      log,
		endpoint: endpoint,
		warn:     rate.Sometimes{Interval: warningInterval},
	}
}

// Handle implements otel.ErrorHandler.
func (h *errorHandler) Handle(err error) {
	log := h.log.Debug
	h.warn.Do(func() { log = h.log.Warn })

	log("failed to export traces; check that an OTLP collector (gRPC) listens on --tracing-endpoint",
		"endpoint", h.endpoint, "err", err)
}
