package rpc

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestCallMetrics(t *testing.T) {
	entered, finish := make(chan struct{}), make(chan struct{})
	c, _, srv := start(t, &service{stop: func(context.Context) (*runtimeapi.StopPodSandboxResponse, error) {
		entered <- struct{}{}
		<-finish
		return nil, fmt.Errorf("stop: %w", errdefs.ErrNotFound)
	}}, nil)

	result := make(chan error, 1)
	go func() {
		_, err := runtimeapi.NewRuntimeServiceClient(c).StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{})
		result <- err
	}()

	<-entered
	if n := testutil.ToFloat64(srv.metrics.inFlight.WithLabelValues("StopPodSandbox")); n != 1 {
		t.Errorf("%v calls in flight", n)
	}

	finish <- struct{}{}
	if err := <-result; status.Code(err) != codes.NotFound {
		t.Error(err)
	}

	if n := testutil.ToFloat64(srv.metrics.inFlight.WithLabelValues("StopPodSandbox")); n != 0 {
		t.Errorf("%v calls in flight after the call", n)
	}
	if !srv.metrics.seconds.DeleteLabelValues("StopPodSandbox", "NotFound") {
		t.Error("no metrics of the call")
	}
}

// TestErrorsMaskSecrets checks errors with the response of a registry that repeats its credentials
// in every form.
func TestErrorsMaskSecrets(t *testing.T) {
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for name, auth := range map[string]*runtimeapi.AuthConfig{
		"password":       {Username: "bob", Password: "s3cret-word"},
		"auth":           {Auth: b64("bob:s3cret-word")},
		"identity token": {IdentityToken: "s3cret-identity"},
		"registry token": {RegistryToken: "s3cret-registry"},
	} {
		secrets := []string{"s3cret", b64("bob:s3cret-word")}
		message := fmt.Sprintf("rejected %s %s %s %s %s; Get \"https://bob:s3cret-url@registry.test/v2/\"; "+
			"Authorization: Bearer s3cret-bearer",
			auth.Password, auth.Auth, b64("bob:"+auth.Password), auth.IdentityToken, auth.RegistryToken)
		if auth.Auth != "" {
			message += " s3cret-word"
		}

		for kind, err := range map[string]error{
			"errdefs": fmt.Errorf("%s: %w", message, errdefs.ErrPermissionDenied),
			"plain":   errors.New(message),
			"status":  status.Error(codes.NotFound, message),
		} {
			t.Run(name+", "+kind, func(t *testing.T) {
				got := maskSecrets(toStatus(err), &runtimeapi.PullImageRequest{Auth: auth})
				for _, s := range secrets {
					if strings.Contains(got.Error(), s) {
						t.Errorf("secret %q in error %v", s, got)
					}
				}

				if status.Code(got) != status.Code(toStatus(err)) || !strings.Contains(got.Error(), "registry.test") {
					t.Errorf("error %v", got)
				}
			})
		}
	}

	plain := status.Error(codes.NotFound, "manifest unknown")
	if got := maskSecrets(plain, nil); got != plain { //nolint:errorlint // the same error
		t.Errorf("%v", got)
	}
}

// TestRepeatedErrorsAreLoggedOnce checks that the same error of a polling kubelet is logged once.
func TestRepeatedErrorsAreLoggedOnce(t *testing.T) {
	log := &lockedBuffer{}
	i := newInterceptor(nil, slog.New(slog.NewTextHandler(log, nil)))
	list := func(err error) {
		i.write(t.Context(), "ListContainers", &runtimeapi.ListContainersRequest{}, nil, time.Millisecond, err)
	}
	for range 100 {
		list(nil)
		list(status.Error(codes.Unavailable, "Docker does not respond"))
		list(status.Error(codes.Internal, "broken"))
	}

	list(status.Error(codes.Internal, "broken differently"))
	if n := strings.Count(log.String(), "\n"); n != 2 {
		t.Errorf("%d lines:\n%s", n, log)
	}

	now := time.Now()
	r := &repeats{last: map[string]failure{}}
	if !r.isNew("m", "x", now) || r.isNew("m", "x", now.Add(repeatInterval-1)) ||
		!r.isNew("m", "x", now.Add(repeatInterval)) ||
		!r.isNew("other", "x", now) {
		t.Error("an error is logged too often, or never again")
	}
}

func TestLogHasCreatedID(t *testing.T) {
	c, log, _ := start(t, &service{}, nil)
	if _, err := runtimeapi.NewImageServiceClient(c).PullImage(t.Context(),
		&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "app:1"}}); err != nil {
		t.Fatal(err)
	}

	if n := strings.Count(log.String(), "\n"); n != 1 ||
		!strings.Contains(log.String(), "image=app:1 id=sha256:1 took=") {
		t.Errorf("%s", log)
	}
}

// TestSpanParent checks that a span is a child of the span in the caller's W3C header.
func TestSpanParent(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	c, srv := serve(t, Services{
		Runtime: &service{stop: func(context.Context) (*runtimeapi.StopPodSandboxResponse, error) {
			return nil, errors.New("Authorization: Bearer s3cret")
		}},
		Image:    &service{},
		Validate: func(any) error { return nil },
		Log:      slog.New(slog.DiscardHandler),
		Traces: trace.NewTracerProvider(trace.WithSpanProcessor(spans),
			trace.WithSampler(trace.ParentBased(trace.NeverSample()))),
	})

	const traceID, spanID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+traceID+"-"+spanID+"-01")
	client := runtimeapi.NewRuntimeServiceClient(c)
	if _, err := client.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{}); err == nil {
		t.Fatal("no error")
	}

	// a call without a trace
	if _, err := client.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{}); err == nil {
		t.Fatal("no error")
	}

	srv.Stop(time.Second)
	all := spans.Ended()
	if len(all) != 1 {
		t.Fatalf("%d spans", len(all))
	}

	s := all[0]
	if s.SpanContext().TraceID().String() != traceID || s.Parent().SpanID().String() != spanID ||
		!strings.HasSuffix(s.Name(), "StopPodSandbox") {
		t.Errorf("span %s of trace %s below %s", s.Name(), s.SpanContext().TraceID(), s.Parent().SpanID())
	}

	if text := fmt.Sprint(s.Status(), s.Attributes(), s.Events()); strings.Contains(text, "s3cret") ||
		!strings.Contains(text, "Authorization") {
		t.Errorf("span: %s", text)
	}
}
