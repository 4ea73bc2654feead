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

// TestCollectorIsAway: spans are dropped, the log says so once, and the end does not wait for long.
func TestCollectorIsAway(t *testing.T) {
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
			t.Error("a rate of a million in a million does not sample")
		}
		span.End()
	}

	begin := time.Now()
	if err := p.Close(); err == nil {
		t.Error("spans were sent to nobody")
	}

	if d := time.Since(begin); d > time.Minute {
		t.Errorf("the end took %v", d)
	}
}

func TestSampling(t *testing.T) {
	p, err := New(t.Context(), Config{Endpoint: "127.0.0.1:1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}

	_, span := p.Tracer("test").Start(t.Context(), "call")
	if span.IsRecording() {
		t.Error("a call that nobody traces is sampled")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func TestComplaintsAreRare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		c := newComplaints(slog.New(slog.NewTextHandler(&log, nil)), "collector:4317")
		for range 5 {
			c.Handle(errors.New("connection refused"))
		}

		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "--tracing-endpoint") {
			t.Errorf("%d lines: %s", n, log.String())
		}

		time.Sleep(complaintInterval)
		c.Handle(errors.New("connection refused"))
		if n := strings.Count(log.String(), "\n"); n != 2 {
			t.Errorf("%d lines: %s", n, log.String())
		}
	})
}
