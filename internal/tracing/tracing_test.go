package tracing

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestCollectorUnavailable checks that Close returns in time and reports the lost spans.
func TestCollectorUnavailable(t *testing.T) {
	var log bytes.Buffer
	p, err := New(t.Context(), Config{
		Endpoint:   "127.0.0.1:1",
		PerMillion: 1e6,
		Node:       "node",
		Version:    "test",
		Log:        slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}

	for range 3 {
		_, span := p.Tracer("test").Start(t.Context(), "call")
		if !span.IsRecording() {
			t.Error("span is not sampled at a rate of 1,000,000 per million")
		}
		span.End()
	}

	begin := time.Now()
	if err := p.Close(); err == nil {
		t.Error("Close returned no error although no collector is running")
	}

	if d := time.Since(begin); d > time.Minute {
		t.Errorf("Close took %v", d)
	}
}

func TestSampling(t *testing.T) {
	p, err := New(t.Context(), Config{Endpoint: "127.0.0.1:1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}

	_, span := p.Tracer("test").Start(t.Context(), "call")
	if span.IsRecording() {
		t.Error("span without a parent is sampled at a rate of 0")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func TestErrorHandlerLimitsWarnings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		h := newErrorHandler(slog.New(slog.NewTextHandler(&log, nil)), "collector:4317")
		for range 5 {
			h.Handle(errors.New("connection refused"))
		}

		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "--tracing-endpoint") {
			t.Errorf("logged %d lines, want 1: %s", n, log.String())
		}

		time.Sleep(warningInterval)
		h.Handle(errors.New("connection refused"))
		if n := strings.Count(log.String(), "\n"); n != 2 {
			t.Errorf("logged %d lines after the interval, want 2: %s", n, log.String())
		}
	})
}
