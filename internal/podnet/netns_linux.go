package podnet

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// inNetNS runs do on a thread in the network namespace at path.
func inNetNS(path string, do func() error) error {
	target, err := openNetNS(path)
	if err != nil {
		return err
	}
	defer target.Close()
	return inNetNSFile(target, do)
}

// inNetNSFile runs do on a thread in an open network namespace.
func inNetNSFile(target *os.File, do func() error) error {
	return runInOtherNetNS(func() error {
		if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", target.Name(), err)
		}
		return nil
	}, do)
}

// openNetNS opens a network namespace by the path of a pin or of a process. It neither follows
// links nor blocks on other kinds of files.
func openNetNS(path string) (*os.File, error) {
	flags := unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC
	if !strings.HasPrefix(path, "/proc/") { // except below /proc, where namespaces are links of the kernel
		flags |= unix.O_NOFOLLOW
	}

	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}

	if err := checkNetNS(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}

	return f, nil
}

// checkNetNS verifies that an open file is a network namespace (ioctl_ns(2)).
func checkNetNS(f *os.File) error {
	if !isNamespaceFile(int(f.Fd())) {
		return fmt.Errorf("%s is not a network namespace: %w", f.Name(), errdefs.ErrFailedPrecondition)
	}

	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err == nil && kind != unix.CLONE_NEWNET {
		err = errors.New("it is a namespace of another type")
	}

	if err != nil {
		return fmt.Errorf("%s is not a network namespace: %w: %w", f.Name(), err, errdefs.ErrFailedPrecondition)
	}

	return nil
}

// isNamespaceFile reports whether a descriptor belongs to the file system of namespaces.
func isNamespaceFile(fd int) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(fd, &st) == nil && int64(st.Type) == unix.NSFS_MAGIC
}

// runInOtherNetNS runs do on a separate thread after enter has moved the thread to another network
// namespace. If the thread cannot return, it ends with its goroutine.
func runInOtherNetNS(enter, do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		original, err := os.Open(threadNetNS)
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer original.Close()

		if err := enter(); err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}

		err = do()
		if unix.Setns(int(original.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}

		done <- err
	}()

	return <-done
}

const threadNetNS = "/proc/thread-self/ns/net"

// loopbackUp brings lo up in a network namespace.
func loopbackUp(netns string) error { return inNetNS(netns, setLoopbackUp) }

// setLoopbackUp brings lo up in the thread's network namespace (netdevice(7), SIOCSIFFLAGS).
func setLoopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)

	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}

	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return err
	}

	req.SetUint16(req.Uint16() | unix.IFF_UP)

	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}
