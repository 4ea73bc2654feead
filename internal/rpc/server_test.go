package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestMain(m *testing.M) {
	if endpoint := os.Getenv(inheritEnv); endpoint != "" {
		sendHello(endpoint)
		return
	}
	goleak.VerifyTestMain(m)
}

// service implements two methods for tests.
type service struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	stop func(context.Context) (*runtimeapi.StopPodSandboxResponse, error)
}

func (s *service) StopPodSandbox(
	ctx context.Context, _ *runtimeapi.StopPodSandboxRequest,
) (*runtimeapi.StopPodSandboxResponse, error) {
	return s.stop(ctx)
}

func (s *service) PullImage(context.Context, *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	return &runtimeapi.PullImageResponse{ImageRef: "sha256:1"}, nil
}

// lockedBuffer is a log for concurrent reads and writes.
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

// start serves s until the test ends. It returns a client and the log.
func start(t *testing.T, s *service, validate func(any) error) (*grpc.ClientConn, *lockedBuffer, *Server) {
	t.Helper()
	log := &lockedBuffer{}
	if validate == nil {
		validate = func(any) error { return nil }
	}
	c, srv := serve(t, Services{Runtime: s, Image: s, Validate: validate, Log: slog.New(slog.NewTextHandler(log, nil))})
	return c, log, srv
}

// serve serves s until the test ends. It returns a client.
func serve(t *testing.T, s Services) (*grpc.ClientConn, *Server) {
	t.Helper()
	srv := New(s)
	l := bufconn.Listen(1 << 20)
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	c, err := grpc.NewClient("passthrough:///test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		c.Close()
		srv.Stop(time.Second)
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})

	return c, srv
}

func TestPanicIsInternal(t *testing.T) {
	c, log, _ := start(t, &service{stop: func(context.Context) (*runtimeapi.StopPodSandboxResponse, error) {
		panic("boom")
	}}, nil)
	client := runtimeapi.NewRuntimeServiceClient(c)
	for range 2 { // the server survives
		if _, err := client.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{}); status.Code(err) !=
			codes.Internal || !strings.Contains(err.Error(), "StopPodSandbox") {
			t.Errorf("error %v, want Internal", err)
		}
	}

	if !strings.Contains(log.String(), "server_test.go") {
		t.Errorf("no stack in the log:\n%s", log)
	}
}

func TestToStatus(t *testing.T) {
	for want, err := range map[codes.Code]error{
		codes.InvalidArgument:    errdefs.ErrInvalidArgument,
		codes.NotFound:           errdefs.ErrNotFound,
		codes.AlreadyExists:      errdefs.ErrAlreadyExists,
		codes.FailedPrecondition: errdefs.ErrConflict,
		codes.Unavailable:        errdefs.ErrUnavailable,
		codes.Unimplemented:      errdefs.ErrNotImplemented,
		codes.PermissionDenied:   errdefs.ErrPermissionDenied,
		codes.Unauthenticated:    errdefs.ErrUnauthenticated,
		codes.ResourceExhausted:  errdefs.ErrResourceExhausted,
		codes.Internal:           errdefs.ErrInternal,
		codes.Aborted:            errdefs.ErrAborted,
		codes.OutOfRange:         errdefs.ErrOutOfRange,
		codes.DataLoss:           errdefs.ErrDataLoss,
		codes.DeadlineExceeded:   context.DeadlineExceeded,
		codes.Canceled:           errors.Join(context.Canceled, errdefs.ErrNotFound),
		codes.Unknown:            errors.New("without a kind"),
		codes.Code(77):           status.Error(77, "with a code"),
	} {
		t.Run(want.String(), func(t *testing.T) {
			got := toStatus(fmt.Errorf("stop sandbox x: %w", err))
			if status.Code(got) != want || !strings.Contains(status.Convert(got).Message(), "stop sandbox x") {
				t.Errorf("status %v, want code %v", got, want)
			}
		})
	}

	if err := toStatus(nil); err != nil {
		t.Errorf("status of nil: %v", err)
	}
}

func TestErrorExcludesResponse(t *testing.T) {
	i := newInterceptor(func(any) error { return nil }, slog.New(slog.DiscardHandler))
	resp, err := i.unary(t.Context(), &runtimeapi.VersionRequest{},
		&grpc.UnaryServerInfo{FullMethod: "/runtime.v1.RuntimeService/Version"},
		func(context.Context, any) (any, error) { return &runtimeapi.VersionResponse{}, errdefs.ErrNotFound })
	if resp != nil || status.Code(err) != codes.NotFound {
		t.Errorf("response %v, error %v", resp, err)
	}
}

func TestNilRequest(t *testing.T) {
	i := newInterceptor(func(any) error { return nil }, slog.New(slog.DiscardHandler))
	for _, req := range []any{nil, (*runtimeapi.VersionRequest)(nil)} {
		_, err := i.unary(t.Context(), req, &grpc.UnaryServerInfo{FullMethod: "/s/Version"},
			func(context.Context, any) (any, error) { panic("handled") })
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%#v: error %v, want InvalidArgument", req, err)
		}
	}
}

// TestUnimplementedErrorsNameMethod calls every unimplemented method of both services.
func TestUnimplementedErrorsNameMethod(t *testing.T) {
	c, _, _ := start(t, &service{}, nil)
	implemented := map[string]bool{"StopPodSandbox": true, "PullImage": true}
	for _, d := range []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc} {
		for _, m := range d.Methods {
			if implemented[m.MethodName] {
				continue
			}

			err := c.Invoke(t.Context(), "/"+d.ServiceName+"/"+m.MethodName, &runtimeapi.VersionRequest{},
				&runtimeapi.VersionResponse{})
			if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), m.MethodName) {
				t.Errorf("%s: %v", m.MethodName, err)
			}
		}

		for _, m := range d.Streams {
			if err := openStream(t, c, d.ServiceName, m); status.Code(err) != codes.Unimplemented ||
				!strings.Contains(err.Error(), m.StreamName) {
				t.Errorf("%s: %v", m.StreamName, err)
			}
		}
	}
}

// openStream sends an empty request on a streaming method and returns the final error.
func openStream(t *testing.T, c *grpc.ClientConn, service string, d grpc.StreamDesc) error {
	t.Helper()
	s, err := c.NewStream(t.Context(), &d, "/"+service+"/"+d.StreamName)
	if err != nil {
		return err
	}

	if err := s.SendMsg(&runtimeapi.VersionRequest{}); err != nil {
		return err
	}

	if err := s.CloseSend(); err != nil {
		return err
	}

	return s.RecvMsg(&runtimeapi.VersionResponse{})
}

func TestValidationComesFirst(t *testing.T) {
	reject := func(req any) error { return fmt.Errorf("id of %T: %w", req, errdefs.ErrInvalidArgument) }
	c, _, _ := start(t, &service{stop: func(context.Context) (*runtimeapi.StopPodSandboxResponse, error) {
		panic("called")
	}}, reject)
	if _, err := runtimeapi.NewRuntimeServiceClient(c).StopPodSandbox(t.Context(),
		&runtimeapi.StopPodSandboxRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("unary: %v", err)
	}

	err := openStream(t, c, "runtime.v1.RuntimeService", runtimeapi.RuntimeService_ServiceDesc.Streams[0])
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("stream: %v", err)
	}
}

func TestLogOfCalls(t *testing.T) {
	c, log, _ := start(t, &service{}, nil)
	_, err := runtimeapi.NewImageServiceClient(c).PullImage(t.Context(), &runtimeapi.PullImageRequest{
		Image: &runtimeapi.ImageSpec{Image: "example.test/app:1"},
		Auth:  &runtimeapi.AuthConfig{Username: "user-in-secret", Password: "pass-in-secret"},
	})
	if err != nil {
		t.Fatal(err)
	}

	_, err = runtimeapi.NewRuntimeServiceClient(c).CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId: "abc",
		Config: &runtimeapi.ContainerConfig{
			Envs: []*runtimeapi.KeyValue{{Key: "TOKEN", Value: []byte("env-in-secret")}},
		},
	})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("CreateContainer: %v", err)
	}

	for _, want := range []string{"PullImage", "example.test/app:1", "took=", "CreateContainer", "sandbox=abc"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("%q is missing in the log:\n%s", want, log)
		}
	}

	if strings.Contains(log.String(), "in-secret") {
		t.Errorf("the log contains secrets:\n%s", log)
	}
}

func TestStopWaitsForRunningCalls(t *testing.T) {
	entered, finish := make(chan struct{}), make(chan struct{})
	c, _, srv := start(t, &service{stop: func(context.Context) (*runtimeapi.StopPodSandboxResponse, error) {
		close(entered)
		<-finish
		return &runtimeapi.StopPodSandboxResponse{}, nil
	}}, nil)

	result := make(chan error, 1)
	go func() {
		_, err := runtimeapi.NewRuntimeServiceClient(c).StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{})
		result <- err
	}()

	<-entered
	stopped := make(chan struct{})
	go func() { srv.Stop(time.Minute); close(stopped) }()
	close(finish)
	if err := <-result; err != nil {
		t.Errorf("running call: %v", err)
	}

	<-stopped
}

func TestStopCancelsCallsAfterGrace(t *testing.T) {
	entered := make(chan struct{})
	c, _, srv := start(t, &service{stop: func(ctx context.Context) (*runtimeapi.StopPodSandboxResponse, error) {
		close(entered)
		<-ctx.Done()
		return nil, ctx.Err()
	}}, nil)

	result := make(chan error, 1)
	go func() {
		_, err := runtimeapi.NewRuntimeServiceClient(c).StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{})
		result <- err
	}()

	<-entered
	srv.Stop(time.Millisecond)
	if err := <-result; err == nil {
		t.Error("the call was not canceled")
	}
}

// TestHold checks that Hold delays calls, and that a call canceled during the delay does not reach
// its method.
func TestHold(t *testing.T) {
	proceed := make(chan struct{})
	canceled := make(chan struct{}, 3)
	called := make(chan struct{}, 3)
	s := &service{stop: func(context.Context) (*runtimeapi.StopPodSandboxResponse, error) {
		called <- struct{}{}
		return &runtimeapi.StopPodSandboxResponse{}, nil
	}}

	c, _ := serve(t, Services{
		Runtime:  s,
		Image:    s,
		Validate: func(any) error { return nil },
		Log:      slog.New(slog.DiscardHandler),
		Hold: func(ctx context.Context, method string) error {
			select {
			case <-proceed:
				return nil
			case <-ctx.Done():
				canceled <- struct{}{}
				return fmt.Errorf("%s: %w", method, ctx.Err())
			}
		},
	})

	client := runtimeapi.NewRuntimeServiceClient(c)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()

	if _, err := client.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{}); status.Code(err) !=
		codes.DeadlineExceeded || len(called) > 0 {
		t.Errorf("delayed call: %v, %d calls", err, len(called))
	}

	events, err := client.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err == nil {
		_, err = events.Recv()
	}

	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("delayed stream: %v", err)
	}

	<-canceled // the client's deadline expires before the server's
	close(proceed)
	if _, err := client.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{}); err != nil ||
		len(called) != 1 {
		t.Errorf("call after the delay: %v, %d calls", err, len(called))
	}
}
