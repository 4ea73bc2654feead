// Package stream serves exec, attach and port-forward over SPDY and WebSockets (k8s.io/streaming).
// Its URLs are valid for one use and one minute. A URL needs no further authentication, so the
// server listens on loopback by default.
//
// Every user of the machine can connect. The server closes connections without a valid URL within
// seconds and, beyond a limit, the oldest of them first (internal/connlimit). The handlers replace
// those of k8s.io/cri-streaming. The latter leak goroutines and connections if a client opens
// unexpected streams, and read terminal sizes of any length into memory.
package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/connlimit"
	"cri-dockerd/internal/engine"
)

// Runtime provides the containers and pods to connect streams to.
type Runtime interface {
	// Exec runs a command in a container and returns its exit code. If ctx ends first, Exec kills
	// the command and its descendants.
	Exec(ctx context.Context, containerID string, x engine.Exec) (exitCode int, err error)
	// Attach connects streams to the main process of a container until the end of its output or of
	// ctx. The process continues.
	Attach(ctx context.Context, containerID string, s engine.Streams) error
	// OpenNetNS opens the network namespace of a running sandbox, or returns nil for the host's.
	// The caller must close it.
	OpenNetNS(sandboxID string) (*os.File, error)
}

// Config configures a Server. Runtime, Dial and Log are required.
type Config struct {
	// Addr is address or address:port. Without a port, any free port is used. Empty selects
	// loopback.
	Addr    string
	Runtime Runtime
	// Dial connects over TCP from inside a network namespace, or from the current one if netns is
	// nil.
	Dial func(ctx context.Context, netns *os.File, addr netip.AddrPort) (net.Conn, error)
	// TLS are the files of the server's certificate and key, both or neither. The server reloads
	// them after a change.
	TLS TLSFiles
	// Spool opens an unnamed file to buffer unread output. If it is nil, output is buffered in
	// memory only.
	Spool func() (*os.File, error)
	Log   *slog.Logger
}

const (
	// requestTimeout bounds the TLS handshake and the request of a client. The kubelet sends its
	// request immediately.
	requestTimeout = 5 * time.Second
	// maxHeaderBytes bounds the header of a request. The kubelet forwards the header of its client.
	maxHeaderBytes = 64 << 10
	// sessionIdleTimeout ends a session without any traffic. It is containerd's default. TCP
	// keepalive detects disconnected clients earlier.
	sessionIdleTimeout = 4 * time.Hour
	// finishTimeout bounds the last writes to a client, such as the exit status.
	finishTimeout = 10 * time.Second
)

// keepAlive detects an unreachable client within 60 s (tcp(7)).
var keepAlive = net.KeepAliveConfig{
	Enable:   true,
	Idle:     30 * time.Second,
	Interval: 10 * time.Second,
	Count:    3,
}

// limits bound the connections. Connections with a valid URL are kept.
var limits = connlimit.Limits{
	Pending:        512,
	PendingPerPeer: 256,
	Kept:           512,
	Response:       []byte("HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"),
}

// Server issues URLs and serves them. It is safe for concurrent use.
type Server struct {
	runtime  Runtime
	dial     func(ctx context.Context, netns *os.File, addr netip.AddrPort) (net.Conn, error)
	log      *slog.Logger
	base     url.URL
	http     *http.Server
	conns    *listener
	tokens   tokens
	forwards forwards
	spools   *spools

	// Tests shorten the following timeouts.
	idle          time.Duration // sessionIdleTimeout
	stall         time.Duration // stallTimeout
	podInterval   time.Duration // podInterval
	streamTimeout time.Duration // defaultStreamTimeout
}

// New returns a listening server, so that its URLs are known. It accepts no requests until Serve.
func New(cfg Config) (*Server, error) {
	certs, err := loadTLS(cfg.TLS, cfg.Log)
	if err != nil {
		return nil, fmt.Errorf("start streaming server: %w", err)
	}

	l, err := net.Listen("tcp", hostPort(cfg.Addr))
	if err != nil {
		return nil, fmt.Errorf("start streaming server: %w; set --streaming-bind-addr to a free address, or "+
			"remove it", err)
	}

	bound := l.Addr().(*net.TCPAddr).AddrPort()
	s := &Server{
		runtime: cfg.Runtime,
		dial:    cfg.Dial,
		log:     cfg.Log,
		base:    url.URL{Scheme: "http", Host: reachable(bound).String()},
		spools:  newSpools(cfg.Spool),

		idle:          sessionIdleTimeout,
		stall:         stallTimeout,
		podInterval:   podInterval,
		streamTimeout: defaultStreamTimeout,
	}

	connLimits := limits
	if certs != nil {
		s.base.Scheme = "https"
		connLimits.Response = nil // a TLS client cannot read it
	}

	s.warn(bound, certs)
	s.conns = &listener{connlimit.New(l, connLimits)}
	s.http = s.newHTTP(certs)

	return s, nil
}

// newHTTP creates the HTTP server. It closes a connection after one response, because a URL is
// valid for one request.
func (s *Server) newHTTP(certs *certificates) *http.Server {
	h := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: requestTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      requestTimeout,
		IdleTimeout:       requestTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ConnContext:       withConn,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}

	h.SetKeepAlivesEnabled(false)
	if certs != nil {
		h.TLSConfig = certs.config()
		h.Protocols = new(http.Protocols) // HTTP/2 connections cannot be upgraded
		h.Protocols.SetHTTP1(true)
	}

	return h
}

// warn logs a warning about an address reachable from other machines without TLS, and about a
// certificate unusable for the kubelet.
func (s *Server) warn(bound netip.AddrPort, certs *certificates) {
	if !bound.Addr().IsLoopback() && certs == nil {
		s.log.Warn("exec, attach and port-forward are reachable from other machines in plain text, protected only by "+
			"secret URLs; set --streaming-tls-cert-file and --streaming-tls-key-file, or remove --streaming-bind-addr",
			"address", bound)
	}

	if certs == nil {
		return
	}

	if err := certs.verifyHost(s.base.Hostname()); err != nil {
		s.log.Warn("the certificate in --streaming-tls-cert-file is not valid for the streaming address, and the "+
			"kubelet will reject it; add the address to the subject alternative names of the certificate",
			"address", s.base.Hostname(), "err", err)
	}
}

// hostPort adds the defaults to --streaming-bind-addr.
func hostPort(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil { // an address without a port
		host, port = strings.Trim(addr, "[]"), "0"
	}

	if host == "" {
		host = "127.0.0.1"
	}

	return net.JoinHostPort(host, port)
}

// reachable returns an address for the kubelet on this machine to connect to.
func reachable(bound netip.AddrPort) netip.AddrPort {
	if bound.Addr().IsUnspecified() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), bound.Port())
	}
	return bound
}

// Serve serves requests until Close and then returns nil.
func (s *Server) Serve() error {
	serve := s.http.Serve
	if s.http.TLSConfig != nil {
		serve = func(l net.Listener) error { return s.http.ServeTLS(l, "", "") }
	}
	if err := serve(s.conns); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("run streaming server: %w", err)
	}

	return nil
}

// Close stops listening and ends all streams. Started processes continue, because they belong to
// their pod.
func (s *Server) Close() error {
	err := s.http.Close()
	if cerr := s.conns.Close(); !errors.Is(cerr, net.ErrClosed) { // Serve may not have been called
		err = errors.Join(err, cerr)
	}
	s.conns.CloseAll()
	return err
}

// GetExec returns a URL for one exec (CRI Exec).
func (s *Server) GetExec(r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	u, err := s.urlOf("exec", r)
	if err != nil {
		return nil, err
	}

	return &runtimeapi.ExecResponse{Url: u}, nil
}

// GetAttach returns a URL for one attach (CRI Attach).
func (s *Server) GetAttach(r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	u, err := s.urlOf("attach", r)
	if err != nil {
		return nil, err
	}

	return &runtimeapi.AttachResponse{Url: u}, nil
}

// GetPortForward returns a URL for connections to a pod (CRI PortForward).
func (s *Server) GetPortForward(r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	u, err := s.urlOf("portforward", r)
	if err != nil {
		return nil, err
	}

	return &runtimeapi.PortForwardResponse{Url: u}, nil
}

// urlOf returns a URL that serves a request once.
func (s *Server) urlOf(kind string, request any) (string, error) {
	token, err := s.tokens.add(request, time.Now())
	if err != nil {
		return "", err
	}
	// #nosec G125 -- kind is a constant, and the token has only letters and digits
	return s.base.JoinPath(kind, token).String(), nil
}
