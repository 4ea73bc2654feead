package tracing

import (
	"log/slog"
	"time"

	"golang.org/x/time/rate"
)

// complaintInterval is how often the log reports that spans cannot be sent.
const complaintInterval = 10 * time.Minute

// complaints logs OpenTelemetry's errors, most of them at debug level only.
type complaints struct {
	log      *slog.Logger
	endpoint string
	warn     rate.Sometimes
}

func newComplaints(log *slog.Logger, endpoint string) *complaints {
	return &complaints{
		log:      log,
		endpoint: endpoint,
		warn:     rate.Sometimes{Interval: complaintInterval},
	}
}

// Handle implements otel.ErrorHandler.
func (c *complaints) Handle(err error) {
	report := c.log.Debug
	c.warn.Do(func() { report = c.log.Warn })
	report("traces are lost; is there an OTLP collector (gRPC) at --tracing-endpoint?", "endpoint", c.endpoint, "err",
		err)
}
