package podnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// entries bounds the number of threads in pods' namespaces. Creating a socket takes microseconds.
var entries = make(chan struct{}, 4)

// Dial connects over TCP from a network namespace; nil means our own. It creates the socket on a
// locked thread in that namespace, because a socket stays in its namespace (network_namespaces(7)).
// It then waits for the connection outside, without a thread, until ctx ends.
func Dial(ctx context.Context, netns *os.File, addr netip.AddrPort) (net.Conn, error) {
	if netns == nil {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr.String())
	}

	fd, err := socketIn(ctx, netns, addr.Addr().Is4())
	if err != nil {
		return nil, fmt.Errorf("create a socket in network namespace %s: %w", netns.Name(), err)
	}

	conn, err := connect(ctx, fd, addr)
	if err != nil {
		return nil, fmt.Errorf("connect to %s in network namespace %s: %w", addr, netns.Name(), err)
	}

	return conn, nil
}

// socketIn creates a non-blocking TCP socket in a network namespace.
func socketIn(ctx context.Context, netns *os.File, v4 bool) (fd int, err error) {
	select {
	case entries <- struct{}{}:
		defer func() { <-entries }()
	case <-ctx.Done():
		return -1, ctx.Err()
	}

	family := unix.AF_INET6
	if v4 {
		family = unix.AF_INET
	}

	enter := func() error { return os.NewSyscallError("setns", unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET)) }
	err = runInOtherNetNS(enter, func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
		return os.NewSyscallError("socket", err)
	})

	return fd, err
}

// connect connects a non-blocking socket and takes ownership of it. It waits in the runtime's
// poller, not in a thread.
func connect(ctx context.Context, fd int, addr netip.AddrPort) (net.Conn, error) {
	// The poller reports an unconnected socket as hung up, so connect comes first.
	begun := unix.Connect(fd, sockaddr(addr))
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close() // the connection has a descriptor of its own

	if begun != nil && begun != unix.EINPROGRESS {
		return nil, os.NewSyscallError("connect", begun)
	}

	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()

	if err := awaitConnected(f); err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("connect: %w", context.Cause(ctx))
		}
		return nil, err
	}

	return net.FileConn(f)
}

// awaitConnected waits for a pending connect of a socket (connect(2), EINPROGRESS).
func awaitConnected(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}

	var result error
	err = raw.Write(func(fd uintptr) (done bool) {
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, err := unix.Poll(ready, 0); err != nil || n == 0 {
			return false
		}

		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = unix.Errno(code)
		}

		result = os.NewSyscallError("connect", err)

		return true
	})
	if err != nil {
		return err
	}

	return result
}

func sockaddr(addr netip.AddrPort) unix.Sockaddr {
	if addr.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
}
