package rpc

import (
	"crypto/tls"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"cri-dockerd/internal/connlimit"
)

const (
	// handshakeTimeout limits the TLS handshake and the HTTP/2 preface.
	handshakeTimeout = 10 * time.Second
	// idleTimeout closes connections without calls. gRPC clients reconnect on demand.
	idleTimeout = 5 * time.Minute
	// pingInterval and pingTimeout detect dead clients.
	pingInterval = time.Minute
	pingTimeout  = 20 * time.Second
	// minPingInterval is the minimum interval between pings of a client.
	minPingInterval = 10 * time.Second
	// maxStreams limits concurrent calls of a connection. The kubelet needs one per pod and a few
	// more. Further calls wait.
	maxStreams = 1000
	// maxHeaderList limits the metadata of a call in bytes.
	maxHeaderList = 64 << 10
	// streamWindow and connWindow limit unread bytes of a call and of a connection (RFC 9113,
	// section 5.2). Without fixed windows gRPC raises them to 16 MiB, and pings the client at most
	// calls to measure the connection.
	streamWindow = 256 << 10
	connWindow   = 1 << 20
)

// tcpLimits limits the connections of a TCP endpoint. A connection is kept after its handshake.
var tcpLimits = connlimit.Limits{
	Pending:        128,
	PendingPerPeer: 64,
	Kept:           256,
	KeptPerPeer:    128,
}

// limits returns the server's limits for all clients.
func limits() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: idleTimeout,
			Time:              pingInterval,
			Timeout:           pingTimeout,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime:             minPingInterval,
			PermitWithoutStream: true,
		}),
	}
}

// limited is a TCP listener with limits, and with TLS if configured.
type limited struct {
	*connlimit.Listener
	tls *tls.Config // nil for plain text
}

// Accept implements net.Listener.
func (l limited) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}

	c := &provenConn{Conn: nc, place: nc.(*connlimit.Conn)}
	if l.tls != nil {
		c.Conn = tls.Server(nc, l.tls)
	}

	return c, nil
}

// provenConn keeps a connection from its first byte on. With TLS the first byte follows the
// verification of the client's certificate.
type provenConn struct {
	net.Conn
	place *connlimit.Conn
	once  sync.Once
}

// Read implements net.Conn.
func (c *provenConn) Read(p []byte) (n int, err error) {
	n, err = c.Conn.Read(p)
	if n > 0 {
		c.once.Do(func() { err = c.keep(err) })
	}
	return n, err
}

// keep keeps the connection, or closes it if the limit is reached.
func (c *provenConn) keep(err error) error {
	if limit := c.place.Keep(); limit != nil {
		c.Close()
		return limit
	}
	return err
}
