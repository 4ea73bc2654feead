package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"
)

const (
	// dialDeadline is for a connection to a port in a pod on this machine: it is accepted or refused at once.
	dialDeadline = 30 * time.Second
	// halfClosed is how long the pod may be silent after the client has ended its side. The streaming server does not tell when the client
	// is gone altogether, and a pod that never ends its side must not hold the connection for ever.
	halfClosed = 10 * time.Minute
)

// PortForward implements streaming.Runtime: it connects to a port on the pod's loopback from inside its network namespace, and copies both
// ways until the pod has ended its side.
func (a *adapter) PortForward(ctx context.Context, sandboxID string, port int32, client io.ReadWriteCloser) error {
	if port < 1 || port > 65535 {
		return fmt.Errorf("port %d is not between 1 and 65535", port)
	}
	netns, err := a.runtime.NetNS(sandboxID)
	if err != nil {
		return err
	}
	pod, err := a.dialLoopback(ctx, netns, port)
	if err != nil {
		return err
	}
	defer pod.Close()
	// When the pod has ended its side there is nothing to wait for: the return closes the client's, which ends this copy.
	go func() {
		_, _ = io.Copy(pod, client) // its end, however it came, is passed on
		if half, ok := pod.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
		_ = pod.SetReadDeadline(time.Now().Add(halfClosed))
	}()
	if _, err = io.Copy(client, pod); errors.Is(err, io.ErrClosedPipe) || errors.Is(err, net.ErrClosed) {
		return nil // the client is gone
	}
	return err
}

// dialLoopback tries IPv4 first, then IPv6: a server may listen on either.
func (a *adapter) dialLoopback(ctx context.Context, netns string, port int32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialDeadline)
	defer cancel()
	var errs []error
	for _, loopback := range []struct{ network, ip string }{{"tcp4", "127.0.0.1"}, {"tcp6", "::1"}} {
		c, err := a.dial(ctx, netns, loopback.network, net.JoinHostPort(loopback.ip, strconv.Itoa(int(port))))
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}
