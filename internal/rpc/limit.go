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
	// handshakeTimeout bounds TLS and the beginning of HTTP/2.
	handshakeTimeout = 10 * time.Second
	// idleTimeout ends connections without calls. Clients of gRPC connect again when they need to.
	idleTimeout = 5 * time.Minute
	// pingInterval and pingTimeout find clients that are gone without a word.
	pingInterval = time.Minute
	pingTimeout  = 20 * time.Second
	// minPingInterval is how often clients may ask in turn.
	minPingInterval = 10 * time.Second
	// maxStreams bounds the calls under way of one connection. The kubelet has one per pod and a
	// few more; further ones wait.
	maxStreams = 1000
	// maxHeaderList bounds the metadata of a call in bytes.
	maxHeaderList = 64 << 10
)

// tcpLimits bound the connections of a TCP endpoint. Those that have completed the handshake are
// kept.
var tcpLimits = connlimit.Limits{
	Pending:        128,
	PendingPerPeer: 64,
	Kept:           256,
	KeptPerPeer:    128,
}

// bounds are the limits of the server for all of its clients.
func bounds() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaderList),
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

// limited is a TCP listener with limits, and with TLS if there is a configuration.
type limited struct {
	*connlimit.Listener
	tls *tls.Config
}

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

// provenConn is kept from its first byte on, which over TLS comes after the client's certificate
// has been verified.
type provenConn struct {
	net.Conn
	place *connlimit.Conn
	once  sync.Once
}

func (c *provenConn) Read(p []byte) (n int, err error) {
	n, err = c.Conn.Read(p)
	if n > 0 {
		c.once.Do(func() { err = c.keep(err) })
	}
	return n, err
}

// keep closes a connection for which there is no room.
func (c *provenConn) keep(err error) error {
	if limit := c.place.Keep(); limit != nil {
		c.Close()
		return limit
	}
	return err
}
