package engine

import (
	"context"
	"encoding/base64"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestOperation(t *testing.T) {
	for request, want := range map[string]string{
		"HEAD /_ping":                                     "HEAD /_ping",
		"GET /v1.41/info":                                 "GET /info",
		"GET /v1.41/events":                               "GET /events",
		"GET /v1.41/containers/json":                      "GET /containers/json",
		"POST /v1.56/containers/create":                   "POST /containers/create",
		"POST /v1.41/containers/0123abc/start":            "POST /containers/{id}/start",
		"GET /v1.41/containers/0123abc/json":              "GET /containers/{id}/json",
		"DELETE /v1.41/containers/0123abc":                "DELETE /containers/{id}",
		"POST /v1.41/exec/0123abc/resize":                 "POST /exec/{id}/resize",
		"GET /v1.41/images/json":                          "GET /images/json",
		"POST /v1.41/images/load":                         "POST /images/load",
		"GET /v1.41/images/registry.test:5000/a/b:1/json": "GET /images/{id}/json",
		"GET /v1.41/images/json/json":                     "GET /images/{id}/json",
		"DELETE /v1.41/images/registry.test/team/json":    "DELETE /images/{id}",
		"GET /v1.41/images/team/containers/odd":           "GET /images/{id}",
		"GET /proxy/v1.41/containers/0123/json":           "GET /containers/{id}/json",
		"GET /proxy/_ping":                                "GET /_ping",
		"GET /v1.41/something/new":                        "GET other",
		"GET /":                                           "GET other",
	} {
		t.Run(request, func(t *testing.T) {
			method, path, _ := strings.Cut(request, " ")
			if got := operation(method, path); got != want {
				t.Errorf("operation(%s) = %q, want %q", request, got, want)
			}
		})
	}
}

// TestRequestsAreCountedAndTraced checks the metrics by route and the trace header.
func TestRequestsAreCountedAndTraced(t *testing.T) {
	var parent string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		if strings.HasSuffix(r.URL.Path, "/start") {
			parent = r.Header.Get("traceparent")
			http.Error(w, `{"message":"no such container"}`, http.StatusNotFound)
		}
	}))

	spans := tracetest.NewSpanRecorder()
	traces := trace.NewTracerProvider(trace.WithSpanProcessor(spans))
	e, err := New(Config{
		Endpoint: "tcp://" + srv.Listener.Addr().String(),
		Traces:   traces,
		Log:      slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()

	ctx, span := traces.Tracer("test").Start(t.Context(), "StartContainer")
	if err := e.Start(ctx, "0123abc"); err == nil {
		t.Error("Start returned no error for status 404")
	}

	span.End()
	if want := span.SpanContext().TraceID().String(); !strings.Contains(parent, want) {
		t.Errorf("the engine received traceparent %q, want trace %s", parent, want)
	}

	srv.Close()
	if err := e.Start(context.WithoutCancel(ctx), "0123abc"); err == nil {
		t.Error("Start returned no error although the engine is down")
	}

	if got := testutil.CollectAndCount(e.calls); got != 3 { // the ping and the two starts
		t.Errorf("%d series, want 3", got)
	}

	for _, code := range []string{"404", "error"} {
		if !e.calls.DeleteLabelValues("POST /containers/{id}/start", code) {
			t.Errorf("no series for code %s", code)
		}
	}

	names := map[string]bool{}
	for _, s := range spans.Ended() {
		names[s.Name()] = true
	}

	if !names["POST /containers/{id}/start"] || !names["HEAD /_ping"] {
		t.Errorf("spans %v", names)
	}
}

// TestPullErrorsHideSecrets uses an engine with the credentials in its error messages.
func TestPullErrorsHideSecrets(t *testing.T) {
	header, err := authHeader(&runtimeapi.AuthConfig{Username: "bob", Password: "hunter-two"})
	if err != nil {
		t.Fatal(err)
	}

	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		if strings.HasSuffix(r.URL.Path, "/images/create") {
			http.Error(w, `{"message":"unauthorized: bob hunter-two `+r.Header.Get("X-Registry-Auth")+`"}`,
				http.StatusInternalServerError)
		}

		if strings.HasSuffix(r.URL.Path, "/json") && strings.Contains(r.URL.Path, "/distribution/") {
			http.Error(w, `{"message":"unauthorized: bob:hunter-two, `+r.Header.Get("X-Registry-Auth")+`"}`,
				http.StatusInternalServerError)
		}
	}))
	defer srv.Close()

	e, err := New(Config{Endpoint: "tcp://" + srv.Listener.Addr().String(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()

	_, err = e.sharedPull(t.Context(), "registry.test/pause:1", header)
	if !errdefs.IsPermissionDenied(err) || strings.Contains(err.Error(), "hunter") ||
		strings.Contains(err.Error(), header) || !strings.Contains(err.Error(), "bob ***") {
		t.Errorf("pull with credentials: %v", err)
	}

	dir := t.TempDir()
	config := `{"auths":{"registry.test":{"auth":"` + base64.StdEncoding.EncodeToString([]byte("bob:hunter-two")) +
		`"}}}`
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}

	e.cfg.AuthDir = dir
	auth, err := machineAuth(dir, "registry.test/pause:1")
	if err != nil || auth == "" {
		t.Fatalf("credentials of this machine: %q, %v", auth, err)
	}

	err = e.ResolveImage(t.Context(), "registry.test/pause:1")
	if err == nil || !strings.Contains(err.Error(), "unauthorized") || strings.Contains(err.Error(), "hunter-two") ||
		strings.Contains(err.Error(), auth) {
		t.Errorf("ResolveImage: %v", err)
	}
}
