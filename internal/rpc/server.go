// Package rpc is the gRPC side of the CRI: the server with its one interceptor (panics, validation,
// log, metrics, status codes, secrets), its traces, and the listeners. It is the only package that
// knows gRPC's server side.
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

// maxMessage is the largest message in bytes that is taken and sent: what the kubelet's client
// takes (its maxMsgSize).
const maxMessage = 16 << 20

// Services are what is served.
type Services struct {
	Runtime  runtimeapi.RuntimeServiceServer
	Image    runtimeapi.ImageServiceServer
	Validate func(req any) error // asked before any method
	// Hold keeps a call of this method back until it can be answered; nil keeps none. It returns
	// ctx's error.
	Hold func(ctx context.Context, method string) error
	Log  *slog.Logger
	// Traces gets a span for every call, a child of the caller's if it tells one (W3C Trace
	// Context); nil for none.
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
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.UnaryInterceptor(i.unary),
		grpc.StreamInterceptor(i.stream),
		grpc.ForceServerCodecV2(newCodec()), grpc.StatsHandler(tagger{}),
	}

	options = append(options, bounds()...)
	if s.Traces != nil {
		options = append(options, grpc.StatsHandler(otelgrpc.NewServerHandler(
			otelgrpc.WithTracerProvider(s.Traces), otelgrpc.WithPropagators(propagation.TraceContext{}),
			otelgrpc.WithMeterProvider(noop.MeterProvider{}))))
	}

	g := grpc.NewServer(options...)
	runtimeapi.RegisterRuntimeServiceServer(g, s.Runtime)
	runtimeapi.RegisterImageServiceServer(g, s.Image)

	return &Server{grpc: g, metrics: i.metrics, log: s.Log}
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
	hold     func(ctx context.Context, method string) error // nil: none
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

// end is what happens after a call: its error gets a code and loses secrets, and it is counted and
// logged.
func (i interceptor) end(
	ctx context.Context, name string, req, resp any, count func(time.Duration, error), took time.Duration, err error,
) error {
	err = bounded(discreet(toStatus(err), req))
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
			resp = nil // never an answer together with an error
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

	return i.answer(ctx, req, name, handler)
}

// answer calls the handler, with a slot for its answer if the answer is or can be large.
func (i interceptor) answer(
	ctx context.Context, req any, name string, handler grpc.UnaryHandler,
) (resp any, err error) {
	var release func()
	if isList(name) {
		if release, err = acquireAnswer(ctx); err != nil {
			return nil, err
		}
		defer func() {
			if resp == nil { // also after a panic
				release()
			}
		}()
	}

	answer, err := handler(ctx, req)
	if err != nil {
		return nil, err
	}

	if err := i.fits(name, answer); err != nil {
		return nil, err
	}

	return holdAnswer(ctx, name, answer, release)
}

// await keeps a call back until it can be answered. A call whose caller has gone meanwhile is not
// made.
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
		release, err := acquireAnswer(s.Context())
		if err != nil {
			return err
		}
		defer release()
	}

	return handler(srv, request)
}

// validated checks the request of a streaming call when the generated code reads it, and the size
// of what is sent.
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
	if err := v.fits(v.name, m); err != nil {
		return err
	}
	return v.ServerStream.SendMsg(m)
}

// method is the last part of /runtime.v1.RuntimeService/RunPodSandbox.
func method(full string) string { return full[strings.LastIndexByte(full, '/')+1:] }
