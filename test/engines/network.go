package engines

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// DialContext connects from inside the network namespace.
func (e *Engine) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	return Dial(ctx, e.NetNS(""), network, addr)
}

// Dial connects to a numeric address from inside the network namespace at a path.
func Dial(ctx context.Context, netns, network, addr string) (conn net.Conn, err error) {
	err = In(netns, func() (err error) {
		d := net.Dialer{FallbackDelay: -1} // a fallback would dial on another thread
		conn, err = d.DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// NetNS returns the outside path of a network namespace: that of a file inside, or the engine's own
// with "".
func (e *Engine) NetNS(inside string) string {
	if inside == "" && e.attached {
		return "/proc/1/ns/net" // not of self: In may have taken the main thread to another one
	}
	if inside == "" {
		return fmt.Sprintf("/proc/%d/ns/net", e.pid)
	}
	return e.Path(inside)
}

// In runs do on a thread in a network namespace. Sockets created there stay there.
func In(netns string, do func() error) error {
	done := make(chan error)
	go func() {
		// never unlocked: the thread ends with this goroutine, and its namespace with it
		runtime.LockOSThread()
		ns, err := os.Open(netns)
		if err == nil {
			defer ns.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}

		if err == nil {
			err = do()
		}

		done <- err
	}()

	return <-done
}

// Listen listens inside the network namespace, on a tcp address.
func (e *Engine) Listen(tb TB, addr string) net.Listener {
	tb.Helper()
	var l net.Listener
	if err := In(e.NetNS(""), func() (err error) { l, err = net.Listen("tcp", addr); return err }); err != nil {
		tb.Fatalf("listen on %s: %v", addr, err)
	}
	return l
}
