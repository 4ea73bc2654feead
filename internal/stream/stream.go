// Package stream serves exec, attach and port-forward over SPDY and WebSockets (k8s.io/streaming),
// with URLs that are good for one use and one minute. Whoever holds a URL may use it once, so the
// server listens on loopback unless it is told otherwise.
//
// Every user of the machine can connect. A connection without a valid URL is closed within seconds,
// and the oldest such connection first when there are many (internal/connlimit). The handlers are
// our own: those of k8s.io/cri-streaming keep goroutines and connections of a client that opens
// streams nobody waits for, and read terminal sizes of any length into memory.
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

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/connlimit"
	"cri-dockerd/internal/engine"
)

// Runtime is what the streams are connected to.
type Runtime interface {
	// Exec runs a command in a container until it ends and returns its exit code. When ctx ends
	// first, what it started is killed.
	Exec(ctx context.Context, containerID string, x engine.Exec) (exitCode int, err error)
	// Attach connects streams to a container's main process until its output ends or ctx does; the
	// process goes on.
	Attach(ctx context.Context, containerID string, s engine.Streams) error
	// OpenNetNS opens a running sandbox's network namespace, nil for the host's. The caller closes
	// it.
	OpenNetNS(sandboxID string) (*os.File, error)
}

// Config configures a Server. Runtime, Dial and Log are required.
type Config struct {
	// Addr is address or address:port; without a port any free one is taken. Empty means loopback.
	Addr    string
	Runtime Runtime
	// Dial connects over TCP from inside a network namespace, nil for our own, until ctx ends.
	Dial func(ctx context.Context, netns *os.File, addr netip.AddrPort) (net.Conn, error)
	// TLS are the files of the server's certificate and key, both or neither. They are read again
	// when they change.
	TLS TLSFiles
	// Spool opens a file without a name, for output that a client has not read; nil for memory
	// alone.
	Spool func() (*os.File, error)
	Log   *slog.Logger
}

const (
	// requestTimeout bounds how long a client may take for its handshake and its request. The
	// kubelet sends it at once.
	requestTimeout = 5 * time.Second
	// maxHeaderBytes bounds the header of a request. The kubelet passes on those of its client.
	maxHeaderBytes = 64 << 10
	// sessionIdleTimeout ends a session in which no byte moves, containerd's default. TCP keepalive
	// finds clients that are gone.
	sessionIdleTimeout = 4 * time.Hour
	// finishTimeout bounds the last writes to a client, such as the exit status.
	finishTimeout = 10 * time.Second
)

// keepAlive finds a client that is gone without a word within 60 s (tcp(7)).
var keepAlive = net.KeepAliveConfig{
	Enable:   true,
	Idle:     30 * time.Second,
	Interval: 10 * time.Second,
	Count:    3,
}

// limits bound the connections. Those that have presented a valid URL are kept.
var limits = connlimit.Limits{
	Pending:        512,
	PendingPerPeer: 256,
	Kept:           512,
	Answer:         []byte("HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"),
}

// Server hands out URLs and serves them. It is safe for concurrent use.
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

	idle          time.Duration // sessionIdleTimeout
	stall         time.Duration // stallTimeout
	podInterval   time.Duration // podInterval
	streamTimeout time.Duration // defaultStreamTimeout; tests shorten all of them
}

// New listens, so that the URLs are known; nothing is answered until Serve.
func New(cfg Config) (*Server, error) {
	certs, err := loadTLS(cfg.TLS, cfg.Log)
	if err != nil {
		return nil, fmt.Errorf("serve streams: %w", err)
	}

	l, err := net.Listen("tcp", hostPort(cfg.Addr))
	if err != nil {
		return nil, fmt.Errorf("serve streams: %w; give a free --streaming-bind-addr, or none", err)
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
		connLimits.Answer = nil // a client of TLS could not read it
	}

	s.warn(bound, certs)
	s.conns = &listener{connlimit.New(l, connLimits)}
	s.http = s.newHTTP(certs)

	return s, nil
}

// newHTTP makes the HTTP server. After a response the connection is closed: a URL is good for one
// request.
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
		h.Protocols = new(http.Protocols) // a connection of HTTP/2 cannot be upgraded
		h.Protocols.SetHTTP1(true)
	}

	return h
}

// warn logs how far an address is open, and a certificate that the kubelet would refuse.
func (s *Server) warn(bound netip.AddrPort, certs *certificates) {
	if !bound.Addr().IsLoopback() && certs == nil {
		s.log.Warn("exec, attach and port-forward can be reached from beyond this machine, in plain text and "+
			"guarded by their secret URLs "+
			"alone; give --streaming-tls-cert-file and --streaming-tls-key-file, or leave --streaming-bind-addr empty",
			"address", bound)
	}

	if certs == nil {
		return
	}

	if err := certs.names(s.base.Hostname()); err != nil {
		s.log.Warn("the kubelet refuses the certificate of --streaming-tls-cert-file: it does not name the "+
			"streaming address; "+
			"add the address to its subject alternative names", "address", s.base.Hostname(), "err", err)
	}
}

// hostPort completes --streaming-bind-addr.
func hostPort(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil { // an address alone
		host, port = strings.Trim(addr, "[]"), "0"
	}

	if host == "" {
		host = "127.0.0.1"
	}

	return net.JoinHostPort(host, port)
}

// reachable is where the kubelet, on this machine, finds a bound address.
func reachable(bound netip.AddrPort) netip.AddrPort {
	if bound.Addr().IsUnspecified() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), bound.Port())
	}
	return bound
}

// Serve answers until Close. It returns nil after Close.
func (s *Server) Serve() error {
	serve := s.http.Serve
	if s.http.TLSConfig != nil {
		serve = func(l net.Listener) error { return s.http.ServeTLS(l, "", "") }
	}
	if err := serve(s.conns); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve streams: %w", err)
	}

	return nil
}

// Close stops listening and ends all streams. Processes that were started go on: they belong to the
// pod.
func (s *Server) Close() error {
	err := s.http.Close()
	if cerr := s.conns.Close(); !errors.Is(cerr, net.ErrClosed) { // Serve may not have begun
		err = errors.Join(err, cerr)
	}
	s.conns.CloseAll()
	return err
}

// GetExec returns a URL for one exec (CRI Exec).
func (s *Server) GetExec(r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if err := checkStreams(r.GetContainerId(), r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()); err != nil {
		return nil, err
	}

	u, err := s.urlOf("exec", r)
	if err != nil {
		return nil, err
	}

	return &runtimeapi.ExecResponse{Url: u}, nil
}

// GetAttach returns a URL for one attach (CRI Attach).
func (s *Server) GetAttach(r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if err := checkStreams(r.GetContainerId(), r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty()); err != nil {
		return nil, err
	}

	u, err := s.urlOf("attach", r)
	if err != nil {
		return nil, err
	}

	return &runtimeapi.AttachResponse{Url: u}, nil
}

// GetPortForward returns a URL for connections to a pod (CRI PortForward).
func (s *Server) GetPortForward(r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	if r.GetPodSandboxId() == "" {
		return nil, fmt.Errorf("pod_sandbox_id is empty: %w", errdefs.ErrInvalidArgument)
	}

	u, err := s.urlOf("portforward", r)
	if err != nil {
		return nil, err
	}

	return &runtimeapi.PortForwardResponse{Url: u}, nil
}

// checkStreams checks what exec and attach ask for.
func checkStreams(containerID string, stdin, stdout, stderr, tty bool) error {
	switch {
	case containerID == "":
		return fmt.Errorf("container_id is empty: %w", errdefs.ErrInvalidArgument)
	case tty && stderr:
		return fmt.Errorf("tty and stderr cannot both be true, a terminal has one output: %w",
			errdefs.ErrInvalidArgument)
	case !stdin && !stdout && !stderr:
		return fmt.Errorf("one of stdin, stdout and stderr must be true: %w", errdefs.ErrInvalidArgument)
	}

	return nil
}

// urlOf returns a URL that serves a request once.
func (s *Server) urlOf(kind string, request any) (string, error) {
	token, err := s.tokens.add(request, time.Now())
	if err != nil {
		return "", err
	}
	// #nosec G125 -- both are ours: a constant, and a token of letters and digits
	return s.base.JoinPath(kind, token).String(), nil
}
