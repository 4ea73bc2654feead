package engines

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/moby/moby/client"
)

// Attach returns the running engine of this machine at a unix socket. Tests use it, but cannot
// start, stop or configure it. Only the files and cgroups of the tests end with tb.
func Attach(tb TB, socket string) *Engine {
	tb.Helper()
	e := &Engine{Socket: socket, attached: true, CgroupParent: "/critest" + random()}
	c, err := client.New(client.WithHost("unix://" + socket))
	if err != nil {
		tb.Fatalf("engine at %s: %v", socket, err)
	}
	defer c.Close()

	info, err := c.Info(context.Background(), client.InfoOptions{})
	if err != nil {
		tb.Fatalf("engine at %s: %v", socket, err)
	}

	e.Version = Version(info.Info.ServerVersion)
	e.Dir, err = os.MkdirTemp("/var/tmp", "cri-engine-") // /tmp may be in memory
	if err == nil {
		err = os.Chmod(e.Dir, 0o711)
	}

	if err != nil {
		tb.Fatalf("engine: %v", err)
	}

	tb.Cleanup(func() {
		if err := os.RemoveAll(e.Dir); err != nil {
			tb.Logf("remove %s: %v", e.Dir, err)
		}
		e.removeSlices(tb)
		removeCgroups(filepath.Base(e.CgroupParent))
	})

	return e
}

// removeSlices removes the slices below CgroupParent. Without the systemd driver there are none.
func (e *Engine) removeSlices(tb TB) {
	slice := filepath.Base(e.CgroupParent) + ".slice"
	if exec.Command("systemctl", "is-active", "--quiet", slice).Run() != nil {
		return
	}
	if out, err := exec.Command("systemctl", "stop", slice).CombinedOutput(); err != nil {
		tb.Logf("remove %s: %v\n%s", slice, err, out)
	}
}

// Attached reports whether the engine is that of Attach.
func (e *Engine) Attached() bool { return e.attached }

// AttachedDaemon connects to the running daemon of Attach's engine, at a unix socket. runDir is its
// --run-directory. The other directories are the defaults of the flags.
func (e *Engine) AttachedDaemon(tb TB, socket, runDir string) *Daemon {
	tb.Helper()
	var answers checked
	tb.Cleanup(func() { answers.end(tb) })
	d := Connect(tb, "unix://"+socket, answers.options()...)
	d.Socket, d.engine = socket, e
	d.PinDir, d.metrics = filepath.Join(runDir, "netns"), filepath.Join(runDir, "metrics.sock")
	d.CacheDir, d.PendingDir = "/var/lib/cni/cache/results", "/var/lib/cni/cache/pending"
	d.LeaseDir = "/var/lib/cni/networks"
	d.Program, _ = exec.LookPath("cri-dockerd") // "" without an installation

	return d
}

// ConfigFile returns the path of a file below /etc that only this engine has.
func (e *Engine) ConfigFile(path string) string {
	if e.attached {
		return path
	}
	return filepath.Join(e.Dir, "root", path)
}

// Address returns an address of the engine's node outside of loopback.
func (e *Engine) Address(tb TB) string {
	tb.Helper()
	if !e.attached {
		return nodeAddress
	}

	c, err := net.Dial("udp", "192.0.2.1:9") // sends nothing
	if err != nil {
		tb.Fatalf("address of this machine: %v; it needs a default route", err)
	}
	defer c.Close()

	return c.LocalAddr().(*net.UDPAddr).IP.String()
}
