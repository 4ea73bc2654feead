// Package stream serves exec, attach and port-forward: Kubernetes' own streaming server (k8s.io/cri-streaming: WebSocket and SPDY, URLs
// good for one use and one minute) over the engine's exec and attach, and port-forward in process. Whoever holds a URL may use it once, so
// the server listens on loopback unless it is told otherwise.
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
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"

	"cri-dockerd/internal/engine"
)

// Runtime is what the streams are connected to.
type Runtime interface {
	// Exec runs a command in a container until it ends and returns its exit code. When ctx ends first, what it started is killed.
	Exec(ctx context.Context, containerID string, x engine.Exec) (exitCode int, err error)
	// Attach connects streams to a container's main process until its output ends or ctx does; the process goes on.
	Attach(ctx context.Context, containerID string, s engine.Streams) error
	// NetNS is the path of a running sandbox's network namespace, "" for the host's.
	NetNS(sandboxID string) (string, error)
}

// Config says where to serve what; all but Addr is required.
type Config struct {
	// Addr is address or address:port; without a port any free one is taken. Empty means loopback.
	Addr    string
	Runtime Runtime
	// Dial connects from inside the network namespace at a path ("" is our own) to a numeric address.
	Dial func(ctx context.Context, netns, network, addr string) (net.Conn, error)
	Log  *slog.Logger
}

// Server hands out URLs and serves them. It is safe for concurrent use.
type Server struct {
	cri   streaming.Server
	http  *http.Server
	conns *listener
}

// headerDeadline bounds how long a client may take to send its request.
const headerDeadline = 30 * time.Second

// New listens, so that the URLs are known; nothing is answered until Serve.
func New(cfg Config) (*Server, error) {
	addr := hostPort(cfg.Addr)
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("serve streams: %w; give a free --streaming-bind-addr, or none", err)
	}
	bound := l.Addr().(*net.TCPAddr).AddrPort()
	if !bound.Addr().IsLoopback() {
		cfg.Log.Warn("exec, attach and port-forward can be reached from beyond this machine, guarded by their secret URLs alone; "+
			"leave --streaming-bind-addr empty unless the kubelet needs it", "address", bound)
	}
	sc := streaming.DefaultConfig
	sc.Addr, sc.BaseURL = addr, &url.URL{Scheme: "http", Host: reachable(bound).String()}
	cri, err := streaming.NewServer(sc, &adapter{cfg.Runtime, cfg.Dial})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("serve streams: %w", err), l.Close())
	}
	return &Server{
		cri:   cri,
		conns: &listener{Listener: l, open: map[*conn]struct{}{}},
		http: &http.Server{
			Handler: cri, ReadHeaderTimeout: headerDeadline, ConnContext: contextOf,
			ErrorLog: slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
		},
	}, nil
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
	if err := s.http.Serve(s.conns); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve streams: %w", err)
	}
	return nil
}

// Close stops listening and ends all streams. Processes that were started go on: they belong to the pod.
func (s *Server) Close() error {
	err := s.http.Close()
	if cerr := s.conns.Close(); !errors.Is(cerr, net.ErrClosed) { // Serve may not have begun
		err = errors.Join(err, cerr)
	}
	s.conns.closeAll()
	return err
}

// GetExec returns a URL for one exec (CRI Exec).
func (s *Server) GetExec(r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	return s.cri.GetExec(&runtimeapi.ExecRequest{
		ContainerId: mark(r.GetContainerId(), r.GetStdin()), Cmd: r.GetCmd(), Tty: r.GetTty(),
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(),
	})
}

// GetAttach returns a URL for one attach (CRI Attach).
func (s *Server) GetAttach(r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	return s.cri.GetAttach(&runtimeapi.AttachRequest{
		ContainerId: mark(r.GetContainerId(), r.GetStdin()), Tty: r.GetTty(),
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(),
	})
}

// GetPortForward returns a URL for connections to a pod (CRI PortForward).
func (s *Server) GetPortForward(r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	return s.cri.GetPortForward(r)
}
