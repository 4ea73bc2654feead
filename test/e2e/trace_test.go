package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"

	"cri-dockerd/test/engines"
)

// otlpAddress is the collector's address inside the node.
const otlpAddress = "127.0.0.1:4317"

const tracedPod = `apiVersion: v1
kind: Pod
metadata: {name: traced, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: traced, image: "cri-test/busybox:latest", imagePullPolicy: Never, command: [sleep, "1000"]}
`

// spans is an OTLP collector with in-memory storage.
type spans struct {
	collector.UnimplementedTraceServiceServer
	mu  sync.Mutex
	all map[string]span // by ID
}

type span struct {
	*otlp.Span
	service string
}

// Export implements the collector's service.
func (c *spans) Export(
	_ context.Context, r *collector.ExportTraceServiceRequest,
) (*collector.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()

	for _, resource := range r.GetResourceSpans() {
		service := ""
		for _, a := range resource.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				service = a.GetValue().GetStringValue()
			}
		}

		for _, scope := range resource.GetScopeSpans() {
			for _, s := range scope.GetSpans() {
				c.all[string(s.GetSpanId())] = span{s, service}
			}
		}
	}

	return &collector.ExportTraceServiceResponse{}, nil
}

// chain returns the ancestry of one of our spans, innermost first. The span's name ends with name,
// and its root span belongs to a kubelet. It returns nil if there is none.
func (c *spans) chain(name string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()

	for _, s := range c.all {
		if s.service != "cri-dockerd" || !strings.HasSuffix(s.GetName(), name) {
			continue
		}

		var ancestry []string
		for known := true; known; s, known = c.all[string(s.GetParentSpanId())] {
			ancestry = append(ancestry, s.service+" "+s.GetName())
		}

		if strings.HasPrefix(ancestry[len(ancestry)-1], "kubelet ") {
			return ancestry
		}
	}

	return nil
}

// TestKubeletTraceContinues verifies that traces of a kubelet continue in the daemon, in its
// requests to Docker and in network plugins.
func TestKubeletTraceContinues(t *testing.T) {
	t.Parallel()
	versions := engines.Versions()
	k := prepare(t, versions[len(versions)-1], "--tracing-endpoint="+otlpAddress)
	srv, c := grpc.NewServer(), &spans{all: map[string]span{}}
	collector.RegisterTraceServiceServer(srv, c)
	l := k.engine.Listen(t, otlpAddress)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Stop)
	k.run(t, k.config+"tracing: {endpoint: '"+otlpAddress+"', samplingRatePerMillion: 1000000}\n")
	k.apply(t, "traced", tracedPod)
	k.waitRunning(t, "traced")
	for _, want := range []string{"/RunPodSandbox", "/StartContainer", "POST /containers/create",
		"POST /containers/{id}/start", "CNI ADD bridge"} {
		var ancestry []string
		eventually(t, "the trace of "+want, func() error {
			if ancestry = c.chain(want); ancestry == nil {
				return errors.New("no span")
			}
			return nil
		})

		if text := fmt.Sprint(ancestry); strings.Contains(want, "CNI") &&
			!strings.Contains(text, "cri-dockerd runtime.v1.RuntimeService/RunPodSandbox") {
			t.Errorf("the ancestry of %s is %s", want, text)
		}

		t.Logf("%s", strings.Join(ancestry, " < "))
	}
}
