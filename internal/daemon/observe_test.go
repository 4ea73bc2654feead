package daemon

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/secret"
)

// leakyEngine is an engine with one pod and one image. It rejects all changes. Its error messages
// contain the credentials of the request, like those of some registries.
type leakyEngine struct {
	mu      sync.Mutex
	parents map[string]string // last traceparent by path
	counts  map[string]int    // number of requests by path
}

const (
	podID   = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	imageID = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

func (e *leakyEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/v1.41")
	e.mu.Lock()
	e.parents[path] = r.Header.Get("traceparent")
	e.counts[path]++
	e.mu.Unlock()
	w.Header().Set("Api-Version", "1.41")
	w.Header().Set("Content-Type", "application/json")
	image := map[string]any{"Id": imageID, "RepoTags": []string{"registry.test/app:1"}, "Config": map[string]any{}}
	responses := map[string]any{
		"/_ping": "OK", "/info": map[string]any{
			"ServerVersion": "20.10.24",
			"Architecture":  "x86_64",
			"OSType":        "linux",
			"CgroupDriver":  "cgroupfs",
		},
		"/containers/json": []any{map[string]any{"Id": podID}},
		"/containers/" + podID + "/json": map[string]any{
			"Id": podID, "Name": "/k8s_POD_web_default_uid_0", "Created": "2026-01-01T00:00:00Z",
			"State":      map[string]any{"Status": "running", "Running": true, "Pid": 1},
			"Config":     map[string]any{"Labels": map[string]string{"io.kubernetes.docker.type": "podsandbox"}},
			"HostConfig": map[string]any{"NetworkMode": "host"},
		},
		"/images/json": []any{image}, "/images/" + imageID + "/json": image,
	}

	switch response, ok := responses[path]; {
	case ok:
		json.NewEncoder(w).Encode(response) //nolint:errcheck // the client detects it
	case path == "/events":
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done()

	case path == "/images/create":
		header := r.Header.Get("X-Registry-Auth")
		b, _ := base64.URLEncoding.DecodeString(header)
		var a struct{ Username, Password, IdentityToken, RegistryToken string }
		json.Unmarshal(b, &a) //nolint:errcheck // absent credentials are empty
		w.WriteHeader(http.StatusInternalServerError)
		json.NewEncoder(w).Encode(map[string]string{"message": fmt.Sprintf( //nolint:errcheck // as above
			"denied: %s %s %s; %s; X-Registry-Auth: %s; Authorization: Basic %s; Get "+
				"\"https://%s:%s@registry.test/v2/?token=%s\"",
			a.Password, a.IdentityToken, a.RegistryToken, b, header,
			base64.StdEncoding.EncodeToString([]byte(a.Username+":"+a.Password)), a.Username, a.Password,
			a.RegistryToken)})

	default:
		w.WriteHeader(http.StatusInternalServerError)
		fmt.Fprint(w, `{"message":"no space left on device"}`)
	}
}

func (e *leakyEngine) parent(path string) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.parents[path]
}

func (e *leakyEngine) count(path string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.counts[path]
}

// running is a daemon with a leakyEngine.
type running struct {
	dir     string
	engine  *leakyEngine
	log     *lockedBuffer
	conn    *grpc.ClientConn
	runtime runtimeapi.RuntimeServiceClient
	image   runtimeapi.ImageServiceClient
}

// lockedBuffer is a buffer for concurrent reads and writes of a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// run starts a daemon and waits until it is ready. It runs until the test ends.
func run(t *testing.T, args ...string) running {
	t.Helper()
	r := running{
		dir:    t.TempDir(),
		engine: &leakyEngine{parents: map[string]string{}, counts: map[string]int{}},
		log:    &lockedBuffer{},
	}

	notified := notifySocket(t)
	socket := filepath.Join(r.dir, "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}

	docker := &http.Server{Handler: r.engine, ReadHeaderTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- docker.Serve(l) }()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	cfg := configure(t, r.dir, append([]string{"--docker-endpoint=unix://" + socket, "--network-plugin="}, args...)...)
	// like config.Logger, at the lowest level
	log := slog.New(slog.NewJSONHandler(r.log, &slog.HandlerOptions{
		Level:       slog.LevelDebug - 10,
		ReplaceAttr: secret.Attr,
	}))

	go func() { ended <- Run(ctx, cfg, "cri-dockerd test", log) }()
	awaitState(t, notified, "READY=1")
	r.conn, err = grpc.NewClient("unix://"+filepath.Join(r.dir, "cri.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}

	r.runtime, r.image = runtimeapi.NewRuntimeServiceClient(r.conn), runtimeapi.NewImageServiceClient(r.conn)
	t.Cleanup(func() {
		r.conn.Close()
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		docker.Close()
		<-served
	})

	return r
}

// get sends a request to the daemon's metrics endpoint.
func (r running) get(t *testing.T, path string) (int, string) {
	t.Helper()
	c := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("unix", filepath.Join(r.dir, "metrics.sock"))
		},
	}}

	resp, err := c.Get("http://daemon" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()

	var b bytes.Buffer
	if _, err := b.ReadFrom(resp.Body); err != nil {
		t.Fatal(err)
	}

	return resp.StatusCode, b.String()
}

// TestNoSecretsInLogsAndErrors uses all kinds of pull credentials, repeated by the registry in
// several forms, and secrets in the environment and annotations of a container. Neither the debug
// log nor any error may contain them.
func TestNoSecretsInLogsAndErrors(t *testing.T) {
	r := run(t)
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	secrets := []string{
		"pass-in-secret", "identity-in-secret", "registry-in-secret", "env-in-secret", "annotation-in-secret",
		"arg-in-secret",
	}
	for _, s := range slices.Clone(secrets) {
		secrets = append(secrets, b64("bob:"+s))
	}

	for name, auth := range map[string]*runtimeapi.AuthConfig{
		"none": nil,
		"password": {
			Username:      "bob",
			Password:      "pass-in-secret",
			ServerAddress: "https://bob:pass-in-secret@registry.test",
		},
		"auth":           {Auth: b64("bob:pass-in-secret")},
		"broken auth":    {Auth: "%pass-in-secret"},
		"identity token": {IdentityToken: "identity-in-secret"},
		"registry token": {RegistryToken: "registry-in-secret"},
	} {
		t.Run(name, func(t *testing.T) { pullWithoutSecrets(t, r, auth, secrets) })
	}

	annotations := map[string]string{"token": "annotation-in-secret"}
	sandbox := &runtimeapi.PodSandboxConfig{
		Metadata:    &runtimeapi.PodSandboxMetadata{Name: "web2", Namespace: "default", Uid: "uid2"},
		Annotations: annotations,
		Linux:       &runtimeapi.LinuxPodSandboxConfig{},
	}

	_, err := r.runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId:  podID,
		SandboxConfig: sandbox,
		Config: &runtimeapi.ContainerConfig{
			Metadata:    &runtimeapi.ContainerMetadata{Name: "app"},
			Image:       &runtimeapi.ImageSpec{Image: imageID},
			Annotations: annotations,
			Envs:        []*runtimeapi.KeyValue{{Key: "TOKEN", Value: []byte("env-in-secret")}},
			Args:        []string{"--token=arg-in-secret"},
			Linux:       &runtimeapi.LinuxContainerConfig{},
		},
	})
	if err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("CreateContainer: %v", err)
	}

	if _, err := r.runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: sandbox}); err == nil {
		t.Error("RunPodSandbox succeeded")
	}

	if _, err := r.runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{}); err != nil {
		t.Error(err)
	}

	text := r.log.String()
	for _, s := range secrets {
		if strings.Contains(text, s) {
			t.Errorf("secret %s in log:\n%s", s, text)
		}
	}

	for _, want := range []string{
		`"PullImage"`, `"CreateContainer"`, `"RunPodSandbox"`, "registry.test/app:1", "DEBUG",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in log:\n%s", want, text)
		}
	}
}

// pullWithoutSecrets checks that a pull fails with an error without secrets.
func pullWithoutSecrets(t *testing.T, r running, auth *runtimeapi.AuthConfig, secrets []string) {
	t.Helper()
	_, err := r.image.PullImage(t.Context(), &runtimeapi.PullImageRequest{
		Image: &runtimeapi.ImageSpec{Image: "registry.test/app:1"},
		Auth:  auth,
	})
	if err == nil {
		t.Fatal("PullImage succeeded")
	}

	for _, s := range secrets {
		if strings.Contains(err.Error(), s) {
			t.Errorf("secret %s in error: %v", s, err)
		}
	}
}

// receiver is an OTLP collector.
type receiver struct {
	collector.UnimplementedTraceServiceServer
	spans chan *otlp.Span
}

// Export implements the collector's service.
func (c receiver) Export(
	_ context.Context, r *collector.ExportTraceServiceRequest,
) (*collector.ExportTraceServiceResponse, error) {
	for _, resource := range r.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, s := range scope.GetSpans() {
				c.spans <- s
			}
		}
	}

	return &collector.ExportTraceServiceResponse{}, nil
}

// TestTracePropagation checks the spans at a collector: the kubelet's span is the parent of the
// call's span, and this one is the parent of the request to the engine. All have the same trace ID,
// and none contains secrets.
func TestTracePropagation(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	srv, rec := grpc.NewServer(), receiver{spans: make(chan *otlp.Span, 100)}
	collector.RegisterTraceServiceServer(srv, rec)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-served })
	r := run(t, "--tracing-endpoint="+l.Addr().String())
	const traceID, parentID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+traceID+"-"+parentID+"-01")
	_, err = r.image.PullImage(ctx, &runtimeapi.PullImageRequest{
		Image: &runtimeapi.ImageSpec{Image: "registry.test/app:1"},
		Auth:  &runtimeapi.AuthConfig{Username: "bob", Password: "pass-in-secret"},
	})
	if err == nil {
		t.Fatal("PullImage succeeded")
	}

	var call, request *otlp.Span
	for call == nil || request == nil { // the exporter sends batches after some seconds
		select {
		case s := <-rec.spans:
			if strings.Contains(s.String(), "in-secret") {
				t.Errorf("secret in span: %v", s)
			}
			if hex.EncodeToString(s.GetTraceId()) != traceID {
				t.Errorf("span of another trace: %v", s)
			} else if strings.HasSuffix(s.GetName(), "PullImage") {
				call = s
			} else if s.GetName() == "POST /images/create" {
				request = s
			}

		case <-t.Context().Done():
			t.Fatalf("missing spans: call %v, request %v", call, request)
		}
	}

	if hex.EncodeToString(call.GetParentSpanId()) != parentID ||
		!bytes.Equal(request.GetParentSpanId(), call.GetSpanId()) {
		t.Errorf("call %v, request %v", call, request)
	}

	want := "00-" + traceID + "-" + hex.EncodeToString(request.GetSpanId()) + "-01"
	if got := r.engine.parent("/images/create"); got != want {
		t.Errorf("engine: got traceparent %q, want %q", got, want)
	}

	// the daemon's own requests are not sampled
	if got := r.engine.parent("/events"); got == "" || strings.HasSuffix(got, "-01") {
		t.Errorf("engine: got traceparent %q for events, want an unsampled one", got)
	}
}

// TestPollingIsNotLogged checks that periodic calls of a kubelet log nothing at level info.
func TestPollingIsNotLogged(t *testing.T) {
	r := run(t)
	lines := func() (n int) {
		for line := range strings.Lines(r.log.String()) {
			if !strings.Contains(line, `"level":"DEBUG"`) {
				n++
			}
		}
		return n
	}
	if _, err := r.runtime.Status(t.Context(), &runtimeapi.StatusRequest{}); err != nil { // wait for the start
		t.Fatal(err)
	}

	before := lines()
	for range 20 {
		if _, err := r.runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{}); err != nil {
			t.Fatal(err)
		}

		if _, err := r.runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{}); err != nil {
			t.Fatal(err)
		}

		if _, err := r.runtime.Status(t.Context(), &runtimeapi.StatusRequest{}); err != nil {
			t.Fatal(err)
		}

		r.get(t, "/metrics")
		r.get(t, "/readyz")
	}

	if n := lines() - before; n != 0 {
		t.Errorf("got %d lines:\n%s", n, r.log)
	}
}
