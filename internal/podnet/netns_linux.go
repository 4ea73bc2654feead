package podnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// inNetNS runs do on a thread that is in the network namespace at path. A thread that cannot go home is ended with its goroutine.
func inNetNS(path string, do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		target, err := os.Open(path)
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer target.Close()
		if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace %s: %w", path, err)
			return
		}
		err = do()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Dial connects from inside a network namespace ("" is our own): the socket is made there, everything after is ordinary.
func Dial(ctx context.Context, netns, network, addr string) (net.Conn, error) {
	var d net.Dialer
	if netns == "" {
		return d.DialContext(ctx, network, addr)
	}
	var conn net.Conn
	err := inNetNS(netns, func() (err error) {
		// The address is numeric, so the dialer makes and connects its socket on this thread. A fallback would dial on another.
		d.FallbackDelay = -1
		conn, err = d.DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// loopbackUp brings lo up in a network namespace (netdevice(7), SIOCSIFFLAGS).
func loopbackUp(netns string) error {
	return inNetNS(netns, func() error {
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
	})
}

// Pins keeps network namespaces alive without a process, by bind mounts in a folder of ours, so that a pod can be disconnected properly
// when its pause process is gone. The mounts outlive the daemon.
type Pins struct{ dir string }

// NewPins uses dir, which is made when it is needed.
func NewPins(dir string) *Pins { return &Pins{dir: dir} }

// file is where a sandbox's pin lies. IDs are Docker's: hex digits only.
func (p *Pins) file(sandboxID string) (string, error) {
	if sandboxID == "" || strings.Trim(sandboxID, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%q is not a sandbox ID", sandboxID)
	}
	return filepath.Join(p.dir, sandboxID), nil
}

// Pin pins the network namespace of a process and returns the pin's path. Pinning again is no error.
func (p *Pins) Pin(sandboxID string, pid int) (string, error) {
	file, err := p.file(sandboxID)
	if err != nil {
		return "", err
	}
	if p.Path(sandboxID) != "" {
		return file, nil
	}
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return "", fmt.Errorf("pin network namespace: %w", err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return "", fmt.Errorf("pin network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount("/proc/"+strconv.Itoa(pid)+"/ns/net", file, "", unix.MS_BIND, ""); err != nil {
		return "", errors.Join(fmt.Errorf("pin network namespace of process %d: %w", pid, err), os.Remove(file))
	}
	return file, nil
}

// nsfsMagic is the file system type of a mounted namespace, <linux/magic.h>.
const nsfsMagic = 0x6e736673

// Path is the pin's path, "" when nothing is pinned.
func (p *Pins) Path(sandboxID string) string {
	file, err := p.file(sandboxID)
	if err != nil {
		return ""
	}
	var st unix.Statfs_t
	if err := unix.Statfs(file, &st); err != nil || int64(st.Type) != nsfsMagic {
		return ""
	}
	return file
}

// Unpin gives the namespace up. What is not pinned is no error.
func (p *Pins) Unpin(sandboxID string) error {
	file, err := p.file(sandboxID)
	if err != nil {
		return err
	}
	if err := unix.Unmount(file, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unpin network namespace %s: %w", file, err)
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unpin network namespace: %w", err)
	}
	return nil
}

// List are the sandboxes for which a pin, or what a crash left of one, is there.
func (p *Pins) List() []string {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil
	}
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}
