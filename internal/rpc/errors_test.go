package rpc

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sizedService is a service with configurable responses to a unary and a streaming call.
type sizedService struct {
	service
	version string
	page    string
}

func (s *sizedService) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: s.version}, nil
}

func (s *sizedService) StreamContainers(
	_ *runtimeapi.StreamContainersRequest, out runtimeapi.RuntimeService_StreamContainersServer,
) error {
	return out.Send(&runtimeapi.StreamContainersResponse{Containers: []*runtimeapi.Container{{Id: s.page}}})
}

// TestResponseLimit checks that a response of one byte over the kubelet's limit is a clear error,
// for unary calls and streams.
func TestResponseLimit(t *testing.T) {
	a := &sizedService{version: strings.Repeat("v", maxMessage-5), page: strings.Repeat("p", maxMessage-10)}
	conn, srv := serve(t, Services{Runtime: a, Image: a, Validate: func(any) error { return nil }, Log: quiet()})
	client := runtimeapi.NewRuntimeServiceClient(conn)
	limit := grpc.MaxCallRecvMsgSize(maxMessage)
	stream := func() error {
		s, err := client.StreamContainers(t.Context(), &runtimeapi.StreamContainersRequest{}, limit)
		if err != nil {
			return err
		}
		_, err = s.Recv()
		return err
	}
	if _, err := client.Version(t.Context(), &runtimeapi.VersionRequest{}, limit); err != nil {
		t.Errorf("response of 16 MiB: %v", err)
	}

	if err := stream(); err != nil {
		t.Errorf("page of 16 MiB: %v", err)
	}

	a.version, a.page = a.version+"v", a.page+"p"
	_, err := client.Version(t.Context(), &runtimeapi.VersionRequest{}, limit)
	for name, err := range map[string]error{"Version": err, "StreamContainers": stream()} {
		if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), name) ||
			!strings.Contains(err.Error(), "16777216") {
			t.Errorf("%s: %v", name, err)
		}
	}

	if n := testutil.ToFloat64(srv.metrics.oversized); n != 2 {
		t.Errorf("%v oversized responses counted, want 2", n)
	}
}

// TestInvalidUTF8 checks that invalid UTF-8 does not fail a response.
func TestInvalidUTF8(t *testing.T) {
	a := &sizedService{version: "1\xff", page: "\xc3"}
	conn, _ := serve(t, Services{Runtime: a, Image: a, Validate: func(any) error { return nil }, Log: quiet()})
	client := runtimeapi.NewRuntimeServiceClient(conn)
	if v, err := client.Version(t.Context(), &runtimeapi.VersionRequest{}); err != nil || v.Version != "1\uFFFD" {
		t.Errorf("%v, %v", v, err)
	}

	s, err := client.StreamContainers(t.Context(), &runtimeapi.StreamContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}

	if page, err := s.Recv(); err != nil || page.Containers[0].Id != "\uFFFD" {
		t.Errorf("%v, %v", page, err)
	}
}

// TestErrorTextLimit checks that the kubelet gets a short and valid text for any error.
func TestErrorTextLimit(t *testing.T) {
	for _, message := range []string{
		strings.Repeat("\xff\x00", 10<<20), strings.Repeat("e", 20<<20), "\x1b[2J", "plain",
	} {
		conn, log, _ := start(t, &service{stop: func(context.Context) (*runtimeapi.StopPodSandboxResponse, error) {
			return nil, errors.New(message)
		}}, nil)
		_, err := runtimeapi.NewRuntimeServiceClient(conn).StopPodSandbox(t.Context(),
			&runtimeapi.StopPodSandboxRequest{PodSandboxId: strings.Repeat("i", 1<<20)})
		s := status.Convert(err)
		if s.Code() != codes.Unknown || len(s.Message()) > maxErrorText || !utf8.ValidString(s.Message()) ||
			strings.ContainsAny(s.Message(), "\x00\x1b") {
			t.Errorf("%s: %d bytes, %.100q", s.Code(), len(s.Message()), s.Message())
		}

		if n := len(log.String()); n > 4*maxErrorText {
			t.Errorf("the log has %d bytes", n)
		}
	}
}

// TestPanicsMaskSecrets checks that the log and the error of a panic have no credentials.
func TestPanicsMaskSecrets(t *testing.T) {
	const password = "hunter/two=\"x\""
	i := newInterceptor(func(any) error { return nil }, quiet())
	log := &lockedBuffer{}
	i.log = textLog(log)
	req := &runtimeapi.PullImageRequest{Auth: &runtimeapi.AuthConfig{Username: "bob", Password: password}}
	_, err := i.unary(t.Context(), req, &grpc.UnaryServerInfo{FullMethod: "/runtime.v1.ImageService/PullImage"},
		func(context.Context, any) (any, error) {
			panic(req.GetAuth())
		})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "hunter") {
		t.Errorf("%v", err)
	}

	if out := log.String(); strings.Contains(out, "hunter") || !strings.Contains(out, "panic") {
		t.Errorf("%s", out)
	}
}

// TestRequestLimit checks that an oversized request is rejected before it is read.
func TestRequestLimit(t *testing.T) {
	conn, _, _ := start(t, &service{}, nil)
	_, err := runtimeapi.NewRuntimeServiceClient(conn).StopPodSandbox(t.Context(),
		&runtimeapi.StopPodSandboxRequest{PodSandboxId: strings.Repeat("i", maxMessage+1)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%v", err)
	}

	_, err = runtimeapi.NewRuntimeServiceClient(conn).StopPodSandbox(t.Context(),
		&runtimeapi.StopPodSandboxRequest{PodSandboxId: "\xff"})
	if err == nil {
		t.Error("a request with invalid UTF-8 was sent")
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func textLog(to io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(to, nil)) }
