// Package rpc is the gRPC side of the CRI: the server with its one interceptor (panics, validation, log, status codes) and the listeners.
// It is the only package that knows gRPC's server side.
package rpc

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage is the largest message in bytes, what the kubelet's client takes too.
const maxMessage = 16 << 20

// Services are what is served.
type Services struct {
	Runtime  runtimeapi.RuntimeServiceServer
	Image    runtimeapi.ImageServiceServer
	Validate func(req any) error // asked before any method
	Log      *slog.Logger
}

// Server is the gRPC server of the CRI.
type Server struct {
	grpc *grpc.Server
	log  *slog.Logger
}

// New registers the services behind the interceptor.
func New(s Services) *Server {
	i := interceptor{validate: s.Validate, log: s.Log}
	// ExecSync answers with up to two streams of 16 MiB.
	g := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(3*maxMessage), grpc.UnaryInterceptor(i.unary), grpc.StreamInterceptor(i.stream))
	runtimeapi.RegisterRuntimeServiceServer(g, s.Runtime)
	runtimeapi.RegisterImageServiceServer(g, s.Image)
	return &Server{grpc: g, log: s.Log}
}

// Serve answers on the listener until Stop; then, and when Stop came first, it returns nil.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Stop lets calls under way finish for at most grace, then breaks them off.
func (s *Server) Stop(grace time.Duration) {
	done := make(chan struct{})
	go func() { s.grpc.GracefulStop(); close(done) }()
	select {
	case <-done:
	case <-time.After(grace):
		s.log.Warn("calls are still under way, breaking them off", "after", grace)
		s.grpc.Stop()
		<-done
	}
}

// interceptor is what happens around every call.
type interceptor struct {
	validate func(any) error
	log      *slog.Logger
}

func (i interceptor) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	begin := time.Now()
	defer func() {
		if p := recover(); p != nil {
			i.log.Error("panic", "rpc", info.FullMethod, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, status.Errorf(codes.Internal, "%s panicked: %v", method(info.FullMethod), p)
		}
		err = toStatus(err)
		i.write(ctx, info.FullMethod, req, time.Since(begin), err)
		if err != nil {
			resp = nil // never an answer together with an error
		}
	}()
	if req == nil || reflect.ValueOf(req).IsNil() {
		return nil, status.Error(codes.InvalidArgument, "the request is empty")
	}
	if err := i.validate(req); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (i interceptor) stream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	begin := time.Now()
	defer func() {
		if p := recover(); p != nil {
			i.log.Error("panic", "rpc", info.FullMethod, "panic", p, "stack", string(debug.Stack()))
			err = status.Errorf(codes.Internal, "%s panicked: %v", method(info.FullMethod), p)
		}
		err = toStatus(err)
		i.write(s.Context(), info.FullMethod, nil, time.Since(begin), err)
	}()
	return handler(srv, validated{s, i.validate})
}

// validated checks the request of a streaming call when the generated code reads it.
type validated struct {
	grpc.ServerStream
	validate func(any) error
}

func (v validated) RecvMsg(m any) error {
	if err := v.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return v.validate(m)
}

// write makes the call's log line: calls that change something at info, the polling at debug. Of a request only names and IDs are logged:
// the rest holds credentials and environments.
func (i interceptor) write(ctx context.Context, full string, req any, took time.Duration, err error) {
	level := slog.LevelDebug
	if mutates(method(full)) {
		level = slog.LevelInfo
	}
	attrs := append(subject(req), slog.Duration("took", took.Round(time.Microsecond)))
	if err != nil {
		attrs = append(attrs, slog.String("code", status.Code(err).String()), slog.String("err", status.Convert(err).Message()))
		if status.Code(err) == codes.Internal || status.Code(err) == codes.Unknown {
			level = slog.LevelError
		}
	}
	i.log.LogAttrs(ctx, level, method(full), attrs...)
}

// subject is what a request is about.
func subject(req any) []slog.Attr {
	var attrs []slog.Attr
	add := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok {
		add("sandbox", r.GetPodSandboxId())
	}
	if r, ok := req.(interface{ GetContainerId() string }); ok {
		add("container", r.GetContainerId())
	}
	switch r := req.(type) {
	case *runtimeapi.RunPodSandboxRequest:
		add("namespace", r.GetConfig().GetMetadata().GetNamespace())
		add("pod", r.GetConfig().GetMetadata().GetName())
	case *runtimeapi.CreateContainerRequest:
		add("name", r.GetConfig().GetMetadata().GetName())
	case *runtimeapi.PullImageRequest:
		add("image", r.GetImage().GetImage())
	case *runtimeapi.RemoveImageRequest:
		add("image", r.GetImage().GetImage())
	}
	return attrs
}

// method is the last part of /runtime.v1.RuntimeService/RunPodSandbox.
func method(full string) string { return full[strings.LastIndexByte(full, '/')+1:] }

// mutates says whether a method changes something on the node.
func mutates(method string) bool {
	return slices.Contains([]string{
		"RunPodSandbox", "StopPodSandbox", "RemovePodSandbox", "CreateContainer", "StartContainer", "StopContainer", "RemoveContainer",
		"UpdateContainerResources", "UpdatePodSandboxResources", "UpdateRuntimeConfig", "PullImage", "RemoveImage",
	}, method)
}
