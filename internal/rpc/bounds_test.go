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

// answers is a service with an answer of its own to one call of each kind.
type answers struct {
	service
	version string
	page    string
}

func (a *answers) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: a.version}, nil
}

func (a *answers) StreamContainers(
	_ *runtimeapi.StreamContainersRequest, out runtimeapi.RuntimeService_StreamContainersServer,
) error {
	return out.Send(&runtimeapi.StreamContainersResponse{Containers: []*runtimeapi.Container{{Id: a.page}}})
}

// TestAnswersFitTheKubelet: one byte more than a kubelet takes is an error with words, of one
// answer and of a stream.
func TestAnswersFitTheKubelet(t *testing.T) {
	a := &answers{version: strings.Repeat("v", maxMessage-5), page: strings.Repeat("p", maxMessage-10)}
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
		t.Errorf("an answer of 16 MiB: %v", err)
	}

	if err := stream(); err != nil {
		t.Errorf("a page of 16 MiB: %v", err)
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
		t.Errorf("%v answers were counted", n)
	}
}

// TestInvalidTextsAreAnswered: a text that is not UTF-8 costs no answer.
func TestInvalidTextsAreAnswered(t *testing.T) {
	a := &answers{version: "1\xff", page: "\xc3"}
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

// TestErrorsAreBounded: an error of any text reaches the kubelet as one that it can store.
func TestErrorsAreBounded(t *testing.T) {
	for _, said := range []string{strings.Repeat("\xff\x00", 10<<20), strings.Repeat("e", 20<<20), "\x1b[2J", "plain"} {
		conn, log, _ := start(t, &service{stop: func(context.Context) (*runtimeapi.StopPodSandboxResponse, error) {
			return nil, errors.New(said)
		}}, nil)
		_, err := runtimeapi.NewRuntimeServiceClient(conn).StopPodSandbox(t.Context(),
			&runtimeapi.StopPodSandboxRequest{PodSandboxId: strings.Repeat("i", 1<<20)})
		s := status.Convert(err)
		if s.Code() != codes.Unknown || len(s.Message()) > maxErrorText || !utf8.ValidString(s.Message()) ||
			strings.ContainsAny(s.Message(), "\x00\x1b") {
			t.Errorf("%s: %d bytes, %.100q", s.Code(), len(s.Message()), s.Message())
		}

		if n := len(log.String()); n > 4*maxErrorText {
			t.Errorf("a log of %d bytes", n)
		}
	}
}

// TestPanicsKeepSecrets: neither the log nor the error of a panic has the request's credentials.
func TestPanicsKeepSecrets(t *testing.T) {
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

// TestRequestsAreBounded: a request that is larger than any kubelet's is refused before it is read.
func TestRequestsAreBounded(t *testing.T) {
	conn, _, _ := start(t, &service{}, nil)
	_, err := runtimeapi.NewRuntimeServiceClient(conn).StopPodSandbox(t.Context(),
		&runtimeapi.StopPodSandboxRequest{PodSandboxId: strings.Repeat("i", maxMessage+1)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%v", err)
	}

	_, err = runtimeapi.NewRuntimeServiceClient(conn).StopPodSandbox(t.Context(),
		&runtimeapi.StopPodSandboxRequest{PodSandboxId: "\xff"})
	if err == nil {
		t.Error("a request that is not UTF-8 was sent")
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func textLog(to io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(to, nil)) }
