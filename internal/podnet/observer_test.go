package podnet

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

func TestPluginsAreCountedAndTraced(t *testing.T) {
	f := newFake(t)
	c := f.network(t, "1.0.0")
	spans := tracetest.NewSpanRecorder()
	traces := trace.NewTracerProvider(trace.WithSpanProcessor(spans))
	c.attach.observer = NewObserver(traces)
	p, _ := newPod(t, sandboxID)
	ctx, call := traces.Tracer("test").Start(t.Context(), "RunPodSandbox")
	f.mode("ADD-error")
	if _, err := c.Add(ctx, p); err == nil {
		t.Error("no error")
	}

	f.mode("")
	del(t, c, p)
	add(t, c, p)
	call.End()
	o := c.attach.observer
	for command, want := range map[string]float64{"ADD": 1, "DEL": 0} {
		if got := testutil.ToFloat64(o.errors.WithLabelValues(command, "fake")); got != want {
			t.Errorf("%v errors of %s, want %v", got, command, want)
		}
		if !o.seconds.DeleteLabelValues(command, "fake") {
			t.Errorf("no time of %s", command)
		}
	}

	failed := false
	for _, s := range spans.Ended() {
		if s.Name() == "CNI ADD fake" && s.Status().Code == codes.Error && strings.Contains(s.Status().Description,
			"no address left") {
			failed = s.Parent().SpanID() == call.SpanContext().SpanID()
		}
	}

	if !failed {
		t.Error("no span below the call says what failed")
	}
}

// TestInvalidConfigurationIsLoggedOnce reads an invalid configuration repeatedly, and logs each
// problem once.
func TestInvalidConfigurationIsLoggedOnce(t *testing.T) {
	conf := t.TempDir()
	file := filepath.Join(conf, "00-broken.conflist")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	write("{")
	var log bytes.Buffer
	c, err := NewCNI(CNIConfig{ConfDir: conf, CacheDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	for range 3 {
		c.Reload(t.Context())
	}

	write(`{"cniVersion":"1.0.0","name":"x"}`)
	for range 3 {
		c.Reload(t.Context())
	}

	if n := strings.Count(log.String(), "\n"); n != 2 || strings.Count(log.String(), "00-broken") < 2 {
		t.Errorf("%d lines:\n%s", n, log.String())
	}
}
