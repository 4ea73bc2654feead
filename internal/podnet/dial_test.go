package podnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
)

// newNetNS creates a network namespace and opens it.
func newNetNS(t *testing.T) *os.File {
	t.Helper()
	pins := NewPins(t.TempDir(), t.TempDir())
	path, err := pins.Create(nil)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		if err := pins.Drop(path); err != nil {
			t.Error(err)
		}
	})

	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { f.Close() })

	return f
}

// listenIn listens on a port in a namespace, with a backlog of one connection.
func listenIn(t *testing.T, netns *os.File, at unix.Sockaddr, family int) (port uint16) {
	t.Helper()
	var fd int
	err := inNetNS(netns.Name(), func() (err error) {
		if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(unix.Bind(fd, at), unix.Listen(fd, 0))
	})
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { unix.Close(fd) })
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}

	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port)
	case *unix.SockaddrInet6:
		return uint16(sa.Port)
	}

	t.Fatal("no port")

	return 0
}

// threads returns the number of threads of this process.
func threads(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}

	_, rest, _ := strings.Cut(string(b), "Threads:")
	n, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}

	return n
}

func TestDialFamilies(t *testing.T) {
	netns := newNetNS(t)
	v4 := listenIn(t, netns, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, unix.AF_INET)
	v6 := listenIn(t, netns, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}, unix.AF_INET6)
	for _, addr := range []string{fmt.Sprintf("127.0.0.1:%d", v4), fmt.Sprintf("[::1]:%d", v6)} {
		c, err := Dial(t.Context(), netns, netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatal(err)
		}

		if c.RemoteAddr().String() != addr {
			t.Errorf("connected to %s, want %s", c.RemoteAddr(), addr)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Error(err)
		}

		c.Close()
		if c, err := Dial(t.Context(), nil, netip.MustParseAddrPort(addr)); err == nil {
			c.Close()
			t.Error("connected to the loopback of the node")
		}
	}

	if _, err := Dial(t.Context(), netns, netip.MustParseAddrPort("127.0.0.1:1")); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a port without a listener: %v", err)
	}
}

// TestDialHoldsNoThread connects to a port without accept. This costs descriptors until the
// deadline, but no threads.
func TestDialHoldsNoThread(t *testing.T) {
	netns := newNetNS(t)
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"),
		listenIn(t, netns, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, unix.AF_INET))
	first, err := Dial(t.Context(), netns, addr) // fills the backlog
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()

	before, descriptors := threads(t), openFiles(t)

	const dials = 500
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()

	var wg sync.WaitGroup
	errs := make(chan error, dials)
	for range dials {
		wg.Go(func() {
			c, err := Dial(ctx, netns, addr)
			if err == nil {
				c.Close()
			}
			errs <- err
		})
	}

	time.Sleep(time.Second)
	if during := threads(t); during > before+20 {
		t.Errorf("%d threads during %d dials, %d before", during, dials, before)
	}

	wg.Wait()
	close(errs)
	timedOut := 0
	for err := range errs {
		if errors.Is(err, context.DeadlineExceeded) {
			timedOut++
		}
	}

	if timedOut < dials-2 { // the kernel accepts one more than the backlog
		t.Errorf("%d of %d dials timed out", timedOut, dials)
	}
	if after := openFiles(t); after > descriptors+4 {
		t.Errorf("%d descriptors after, %d before", after, descriptors)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestOpenProcess(t *testing.T) {
	id, other := strings.Repeat("ab", 32), strings.Repeat("cd", 32)
	for name, test := range map[string]struct {
		groups string
		ok     bool
	}{
		"systemd driver": {"0::/kubepods.slice/docker-" + id + ".scope\n", true},
		"cgroupfs driver, v1": {"2:cpu:/kubepods/pod1/" + id + "\n1:name=systemd:/kubepods/pod1/" + id +
			"\n", true},
		"a child group":                      {"0::/docker/" + id + "/init\n", true},
		"another container":                  {"0::/docker/" + other + "\n", false},
		"another container that uses the ID": {"0::/docker/" + other + "/" + id + "\n", false},
		"another container in one hierarchy": {"2:cpu:/docker/" + id + "\n1:name=systemd:/docker/" + other + "\n",
			false},
		"a process of the node":  {"0::/system.slice/sshd.service\n", false},
		"nothing":                {"", false},
		"a line of another form": {id + ":x:/\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			proc := t.TempDir()
			if err := os.MkdirAll(filepath.Join(proc, "7/ns"), 0o755); err != nil {
				t.Fatal(err)
			}

			for file, text := range map[string]string{"7/cgroup": test.groups, "7/ns/net": "namespace"} {
				if err := os.WriteFile(filepath.Join(proc, file), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}

			f, err := openProcess(proc, model.ContainerID(id), 7)
			if !test.ok {
				if !errdefs.IsNotFound(err) {
					t.Errorf("opened %v, %v", f, err)
				}
				return
			}

			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()

			if b, err := io.ReadAll(f); err != nil || string(b) != "namespace" {
				t.Errorf("opened %q, %v", b, err)
			}
		})
	}

	if _, err := OpenProcess(model.ContainerID(id), os.Getpid()); !errdefs.IsNotFound(err) {
		t.Errorf("own process as a container: %v", err)
	}

	if _, err := NewPins(t.TempDir(), t.TempDir()).OpenPin(model.ContainerID(id)); !errdefs.IsNotFound(err) {
		t.Errorf("missing pin: %v", err)
	}
}
