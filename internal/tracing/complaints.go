package tracing

import (
	"log/slog"
	"sync"
	"time"
)

// complainAgain is how often the log tells that spans cannot be sent.
const complainAgain = 10 * time.Minute

// complaints logs what OpenTelemetry has to say about itself, seldom.
type complaints struct {
	log      *slog.Logger
	endpoint string

	mu   sync.Mutex
	last time.Time
}

// Handle implements otel.ErrorHandler.
func (c *complaints) Handle(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	say := c.log.Debug
	if now := time.Now(); now.Sub(c.last) >= complainAgain {
		say, c.last = c.log.Warn, now
	}
	say("traces are lost; is there an OTLP collector (gRPC) at --tracing-endpoint?", "endpoint", c.endpoint, "err", err)
}
