// Package rpc is the gRPC side of the CRI: the server, its traces and its listeners. One
// interceptor handles panics, validation, logs, metrics, status codes and secrets. No other package
// uses gRPC's server side.
package rpc

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"reflect"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage is the maximum size in bytes of requests and responses: the limit of the kubelet's
// client (its maxMsgSize).
const maxMessage = 16 << 20

// Services are the services of a Server, and the functions around their methods.
type Services struct {
	Runtime  runtimeapi.RuntimeServiceServer
	Image    runtimeapi.ImageServiceServer
	Validate func(req any) error // checks each request before its method
	// Hold delays a call until its method can be served, or returns the error of ctx. nil delays no
	// call.
	Hold func(ctx context.Context, method string) error
	Log  *slog.Logger
	// Traces records a span for every call, as a child of the caller's span if there is one (W3C
	// Trace Context). nil disables traces.
	Traces trace.TracerProvider
}

// Server is the gRPC server of the CRI.
type Server struct {
	grpc    *grpc.Server
	metrics rpcMetrics
	log     *slog.Logger
}

// New registers the services behind the interceptor.
func New(s Services) *Server {
	i := newInterceptor(s.Validate, s.Log)
	i.hold = s.Hold
	options := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(i.unary),
		grpc.StreamInterceptor(i.stream),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.StatsHandler(tagger{}),
	}

	options = append(options, limits()...)
	if s.Traces != nil {
		options = append(options, grpc.StatsHandler(otelgrpc.NewServerHandler(
			otelgrpc.WithTracerProvider(s.Traces),
			otelgrpc.WithPropagators(propagation.TraceContext{}),
			otelgrpc.WithMeterProvider(noop.MeterProvider{}),
		)))
	}

	g := grpc.NewServer(options...)
	runtimeapi.RegisterRuntimeServiceServer(g, s.Runtime)
	runtimeapi.RegisterImageServiceServer(g, s.Image)

	return &Server{grpc: g, metrics: i.metrics, log: s.Log}
}

// Serve serves the listener until Stop. It returns nil after Stop, also if Stop was called before.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Stop waits for running calls for at most grace and then cancels them.
func (s *Server) Stop(grace time.Duration) {
	done := make(chan struct{})
	go func() { s.grpc.GracefulStop(); close(done) }()
	select {
	case <-done:
	case <-time.After(grace):
		s.log.Warn("canceling calls still running after the grace period", "grace", grace)
		s.grpc.Stop()
		<-done
	}
}

// interceptor wraps every call.
type interceptor struct {
	validate func(any) error
	hold     func(ctx context.Context, method string) error // may be nil
	log      *slog.Logger
	metrics  rpcMetrics
	repeats  *repeats
}

func newInterceptor(validate func(any) error, log *slog.Logger) interceptor {
	return interceptor{
		validate: validate,
		log:      log,
		metrics:  newRPCMetrics(),
		repeats:  &repeats{last: map[string]failure{}},
	}
}

// end completes a call: it adds a code to its error and masks secrets, and it counts and logs the
// call.
func (i interceptor) end(
	ctx context.Context, name string, req, resp any, count func(time.Duration, error), took time.Duration, err error,
) error {
	err = limitText(maskSecrets(toStatus(err), req))
	count(took, err)
	i.write(ctx, name, req, resp, took, err)
	return err
}

func (i interceptor) unary(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (resp any, err error) {
	begin, name := time.Now(), method(info.FullMethod)
	count := i.metrics.begin(name)
	defer func() {
		if p := recover(); p != nil {
			i.logPanic(info.FullMethod, p, req)
			resp, err = nil, status.Errorf(codes.Internal, "%s panicked: %v", name, p)
		}
		if err = i.end(ctx, name, req, resp, count, time.Since(begin), err); err != nil {
			resp = nil // an error excludes a response
		}
	}()

	if req == nil || reflect.ValueOf(req).IsNil() {
		return nil, status.Error(codes.InvalidArgument, "the request is empty")
	}
	if err := i.validate(req); err != nil {
		return nil, err
	}

	if err := i.await(ctx, name); err != nil {
		return nil, err
	}

	return i.respond(ctx, req, name, handler)
}

// respond calls the handler, with a slot for responses that are or may be large.
func (i interceptor) respond(
	ctx context.Context, req any, name string, handler grpc.UnaryHandler,
) (resp any, err error) {
	var release func()
	if isList(name) {
		if release, err = acquireSlot(ctx); err != nil {
			return nil, err
		}
		defer func() {
			if resp == nil { // also after a panic
				release()
			}
		}()
	}

	unheld, err := handler(ctx, req)
	if err != nil {
		return nil, err
	}

	if err := i.checkSize(name, unheld); err != nil {
		return nil, err
	}

	return holdResponse(ctx, name, unheld, release)
}

// await delays a call until it can be served. It fails if the caller cancels the call meanwhile.
func (i interceptor) await(ctx context.Context, method string) error {
	if i.hold == nil {
		return nil
	}
	if err := i.hold(ctx, method); err != nil {
		return err
	}
	return ctx.Err()
}

func (i interceptor) stream(
	srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler,
) (err error) {
	begin, name := time.Now(), method(info.FullMethod)
	count := i.metrics.begin(name)
	request := &validated{ServerStream: s, interceptor: i, name: name}
	defer func() {
		if p := recover(); p != nil {
			i.logPanic(info.FullMethod, p, request.last)
			err = status.Errorf(codes.Internal, "%s panicked: %v", name, p)
		}
		err = i.end(s.Context(), name, request.last, nil, count, time.Since(begin), err)
	}()

	if err := i.await(s.Context(), name); err != nil {
		return err
	}

	if isList(name) {
		release, err := acquireSlot(s.Context())
		if err != nil {
			return err
		}
		defer release()
	}

	return handler(srv, request)
}

// validated checks the request of a streaming call when the generated code reads it, and the size
// of each response.
type validated struct {
	grpc.ServerStream
	interceptor
	name string
	last any // the request
}

// RecvMsg implements grpc.ServerStream.
func (v *validated) RecvMsg(m any) error {
	if err := v.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	v.last = m
	return v.validate(m)
}

// SendMsg implements grpc.ServerStream.
func (v *validated) SendMsg(m any) error {
	if err := v.checkSize(v.name, m); err != nil {
		return err
	}
	return v.ServerStream.SendMsg(m)
}

// method returns the last part of a full name, as in /runtime.v1.RuntimeService/RunPodSandbox.
func method(full string) string { return full[strings.LastIndexByte(full, '/')+1:] }
