package podnet

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// inNetNS runs do on a thread that is in the network namespace at path.
func inNetNS(path string, do func() error) error {
	target, err := os.Open(path)
	if err != nil {
		return err
	}
	defer target.Close()
	return awayFromHome(func() error {
		if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return nil
	}, do)
}

// awayFromHome runs do on a thread of its own after leave, which takes the thread to another network namespace. A thread that cannot go home
// is ended with its goroutine.
func awayFromHome(leave, do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open(threadNetNS)
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		if err := leave(); err != nil {
			runtime.UnlockOSThread()
			done <- err
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

// Pins keeps network namespaces alive without a process, by bind mounts in a folder of ours, so that a pod can be disconnected properly
// when its pause process is gone. The mounts outlive the daemon. A pin has its sandbox's ID as its name; a namespace that was made before its
// sandbox has a name of its own until then.
type Pins struct {
	dir string

	mu   sync.Mutex      // guards made
	made map[string]bool // the names of namespaces that Make has made and nobody has dropped
}

// NewPins uses dir, which is made when it is needed.
func NewPins(dir string) *Pins { return &Pins{dir: dir, made: map[string]bool{}} }

// newMark begins the names of namespaces that have no sandbox yet.
const newMark = "new-"

// file is where a sandbox's pin lies. IDs are Docker's: hex digits only.
func (p *Pins) file(sandboxID string) (string, error) {
	if sandboxID == "" || strings.Trim(sandboxID, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%q is not a sandbox ID", sandboxID)
	}
	return filepath.Join(p.dir, sandboxID), nil
}

// Pin pins the network namespace of a process and returns the pin's path. Pinning again is no error.
func (p *Pins) Pin(sandboxID string, pid int) (string, error) {
	return p.pin(sandboxID, "/proc/"+strconv.Itoa(pid)+"/ns/net")
}

// Keep pins a namespace of Make for the sandbox that has joined it, or is to, and returns the pin's path.
func (p *Pins) Keep(sandboxID, made string) (string, error) { return p.pin(sandboxID, made) }

func (p *Pins) pin(sandboxID, netns string) (string, error) {
	file, err := p.file(sandboxID)
	if err != nil {
		return "", err
	}
	if p.Path(sandboxID) != "" {
		return file, nil
	}
	return file, p.mount(netns, file)
}

// mount mounts a namespace on a file, which is made.
func (p *Pins) mount(netns, file string) error {
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return fmt.Errorf("pin network namespace: %w", err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("pin network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount(netns, file, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("pin network namespace %s: %w", netns, err), os.Remove(file))
	}
	return nil
}

// Make makes a network namespace with lo up, Docker's defaults and these sysctls ("net.core.somaxconn"), and returns the path where it is pinned until Drop.
func (p *Pins) Make(sysctls map[string]string) (path string, err error) {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails
	name := newMark + hex.EncodeToString(b)
	p.mu.Lock()
	p.made[name] = true
	p.mu.Unlock()
	path = filepath.Join(p.dir, name)
	err = awayFromHome(func() error { return os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET)) }, func() error {
		if err := setLoopbackUp(); err != nil {
			return fmt.Errorf("bring up lo: %w", err)
		}
		if err := writeSysctls(sysctls); err != nil {
			return err
		}
		return p.mount(threadNetNS, path)
	})
	if err != nil {
		return "", errors.Join(fmt.Errorf("make network namespace: %w", err), p.Drop(path))
	}
	return path, nil
}

// defaultSysctls are what Docker sets in network namespaces of its own, as far as the kernel has them: pods may use low ports and ping.
func defaultSysctls() map[string]string {
	return map[string]string{"ipv4/ip_unprivileged_port_start": "0", "ipv4/ping_group_range": "0 2147483647"}
}

// writeSysctls sets sysctls of the thread's network namespace (proc(5), /proc/sys/net), after the defaults.
func writeSysctls(sysctls map[string]string) error {
	for name, value := range defaultSysctls() {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("sysctl net/%s=%q: %w", name, value, err)
		}
	}
	for name, value := range sysctls {
		file := name
		if !strings.Contains(name, "/") { // with slashes, dots belong to names (sysctl(8))
			file = strings.ReplaceAll(name, ".", "/")
		}
		if !filepath.IsLocal(file) || !strings.HasPrefix(filepath.Clean(file), "net/") {
			return fmt.Errorf("sysctl %q is not one of a network namespace: %w", name, errdefs.ErrInvalidArgument)
		}
		err := os.WriteFile(filepath.Join("/proc/sys", file), []byte(value), 0o644)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EINVAL) || errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("sysctl %s=%q: %w: %w", name, value, err, errdefs.ErrInvalidArgument)
		} else if err != nil {
			return fmt.Errorf("sysctl %s=%q: %w", name, value, err)
		}
	}
	return nil
}

// Drop gives up a path of Make. The namespace lives on where it is kept, and with the processes in it.
func (p *Pins) Drop(path string) error {
	err := unmount(path)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.made, filepath.Base(path))
	return err
}

// Sweep gives up what earlier processes made and never dropped.
func (p *Pins) Sweep() error {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil //nolint:nilerr // there is no folder before the first pin
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), newMark) && !p.made[e.Name()] {
			errs = append(errs, unmount(filepath.Join(p.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// Joined says whether a process is in the network namespace that is pinned for a sandbox.
func (p *Pins) Joined(sandboxID string, pid int) bool {
	var pinned, joined unix.Stat_t
	return p.Path(sandboxID) != "" && unix.Stat(p.Path(sandboxID), &pinned) == nil && unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/net", &joined) == nil &&
		pinned.Dev == joined.Dev && pinned.Ino == joined.Ino
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

// Addresses are those of a pod's interface in the namespace of its pause process, nil if there are none.
func (p *Pins) Addresses(pid int) []netip.Addr {
	return Addresses("/proc/" + strconv.Itoa(pid) + "/ns/net")
}

// Unpin gives the namespace up. What is not pinned is no error.
func (p *Pins) Unpin(sandboxID string) error {
	file, err := p.file(sandboxID)
	if err != nil {
		return err
	}
	return unmount(file)
}

// unmount undoes mount.
func unmount(file string) error {
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
		if !strings.HasPrefix(e.Name(), newMark) {
			ids = append(ids, e.Name())
		}
	}
	return ids
}
