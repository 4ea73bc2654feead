// Package nodes starts complete nodes for tests. A node has systemd as process 1 in its own
// namespaces, the host's file system as a read-only layer, and Docker Engine from the host's
// package. It neither sees nor changes the services, data and configuration of the host, and all
// its state is removed at the end of the test. The package requires root and Debian's packages
// systemd, dbus, docker.io and iptables.
package nodes

import (
	"bytes"
	"crypto/rand"
	_ "embed" // for the script
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"cri-dockerd/test/engines"
)

//go:embed node.sh
var script string

// Gateway is the address of the network's switch. Tests may listen on it for the nodes (engines.In
// with Network.NetNS).
const Gateway = "10.89.0.1"

// Network is a switch in its own network namespace, for the connections between nodes. It has no
// uplink.
type Network struct {
	pid   string
	nodes int
}

// NewNetwork creates a network. It is removed at the end of the test.
func NewNetwork(tb engines.TB) *Network {
	tb.Helper()
	dir := tempDir(tb)
	tb.Cleanup(func() { removeAll(tb, dir) })
	_, pid := hold(tb, exec.Command("unshare", "-n", "sh", writeScript(tb, dir), "network"))
	return &Network{pid: pid}
}

// NetNS returns the path of the switch's network namespace.
func (w *Network) NetNS() string { return "/proc/" + w.pid + "/ns/net" }

// Config configures a node.
type Config struct {
	Network *Network        // nil for a new network
	Engine  engines.Version // "" for the host's package
	// cgroup driver of the engine, systemd or cgroupfs; "" for the engine's default
	Driver   string
	NoDocker bool              // the engine is installed but neither enabled nor started
	Files    map[string]string // by path, created before systemd starts
	Hosts    map[string]string // addresses by name
	Binds    map[string]string // files and directories of the host, by path in the node
}

// Node is a running node.
type Node struct {
	Name    string // node1, node2, … in its network, resolvable by all nodes
	Address string // in the network

	network     *Network
	guard       *guard
	docker      bool // Docker starts with the node
	dir, cgroup string
	pid         string // of process 1, in the namespace of the test
}

const bootTimeout = 2 * time.Minute

// Start starts a node and waits until systemd has started all units, including Docker. The node
// runs until the end of the test.
func Start(tb engines.TB, c Config) *Node {
	tb.Helper()
	if c.Network == nil {
		c.Network = NewNetwork(tb)
	}

	c.Network.nodes++
	n := &Node{
		Name:    fmt.Sprint("node", c.Network.nodes),
		Address: fmt.Sprint("10.89.0.", 10+c.Network.nodes),
		network: c.Network,
		docker:  !c.NoDocker,
		dir:     tempDir(tb),
		cgroup:  "cri-test-node-" + random(),
	}

	for _, d := range []string{"root", "upper", "work", "own", "files"} {
		if err := os.Mkdir(filepath.Join(n.dir, d), 0o755); err != nil {
			tb.Fatalf("node: %v", err)
		}
	}

	n.prepare(tb, c)
	n.guard, n.pid = hold(tb, exec.Command("unshare", "-m", "--propagation", "private",
		"sh", writeScript(tb, n.dir), "guard", n.dir,
		n.cgroup, n.Name, n.Address, c.Network.pid))
	tb.Cleanup(func() {
		if tb.Failed() {
			out, _ := n.Try("journalctl", "--no-pager", "-q", "-n", "80")
			tb.Logf("last journal entries of %s:\n%s", n.Name, out)
		}
	})

	n.awaitBoot(tb, n.docker)

	return n
}

// masked has the units without use in a node and those with effects on the host.
var masked = []string{
	"systemd-udevd.service", "systemd-udev-trigger.service", "systemd-udevd-control.socket",
	"systemd-udevd-kernel.socket", "systemd-sysctl.service",
	"systemd-modules-load.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount",
	"sys-kernel-config.mount", "sys-kernel-debug.mount",
	"sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount", "systemd-random-seed.service",
	"systemd-journald-audit.socket", "systemd-logind.service",
	"getty.target", "systemd-tmpfiles-clean.timer", "systemd-firstboot.service", "systemd-repart.service",
	"systemd-resolved.service",
}

// prepare writes the initial files of the node.
func (n *Node) prepare(tb engines.TB, c Config) {
	tb.Helper()
	hosts := "127.0.0.1 localhost\n"
	for i := 1; i < 10; i++ {
		hosts += fmt.Sprintf("10.89.0.%d node%d\n", 10+i, i)
	}

	for name, address := range c.Hosts {
		hosts += address + " " + name + "\n"
	}

	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	n.addFile(tb, "/etc/hosts", hosts)
	n.addFile(tb, "/etc/hostname", n.Name+"\n")
	n.addFile(tb, "/etc/machine-id", hex.EncodeToString(id)+"\n")
	n.addFile(tb, "/etc/resolv.conf", "nameserver "+Gateway+"\n")
	n.addFile(tb, "/etc/fstab", "")
	n.addFile(tb, "/etc/systemd/journald.conf.d/node.conf", "[Journal]\nReadKMsg=no\nRateLimitIntervalSec=0\n")
	n.addLink(tb, "/dev/null", "/etc/systemd/system-generators/systemd-sysv-generator")
	for _, u := range masked {
		n.addLink(tb, "/dev/null", "/etc/systemd/system/"+u)
	}

	if c.Driver != "" {
		b, err := json.Marshal(map[string]any{"exec-opts": []string{"native.cgroupdriver=" + c.Driver}})
		if err != nil {
			tb.Fatalf("node: %v", err)
		}
		n.addFile(tb, "/etc/docker/daemon.json", string(b))
	}

	if !c.NoDocker {
		n.addLink(tb, "/lib/systemd/system/docker.service",
			"/etc/systemd/system/multi-user.target.wants/docker.service")
		n.addLink(tb, "/lib/systemd/system/containerd.service",
			"/etc/systemd/system/multi-user.target.wants/containerd.service")
		n.addLink(tb, "/lib/systemd/system/docker.socket", "/etc/systemd/system/sockets.target.wants/docker.socket")
	}

	binds := n.addEngine(tb, c.Engine)
	for path, content := range c.Files {
		n.addFile(tb, path, content)
	}

	for path, file := range c.Binds {
		binds += file + " " + path + "\n"
	}

	writeFile(tb, filepath.Join(n.dir, "binds"), binds, 0o644)
}

// addFile adds an initial file of the node.
func (n *Node) addFile(tb engines.TB, path, content string) {
	tb.Helper()
	writeFile(tb, filepath.Join(n.dir, "files", path), content, 0o755)
}

// writeFile writes a file and creates its parent directories.
func writeFile(tb engines.TB, file, content string, mode os.FileMode) {
	tb.Helper()
	err := os.MkdirAll(filepath.Dir(file), 0o755)
	if err == nil {
		err = os.WriteFile(file, []byte(content), mode)
	}

	if err != nil {
		tb.Fatalf("node: %v", err)
	}
}

// addLink adds an initial symbolic link of the node.
func (n *Node) addLink(tb engines.TB, target, path string) {
	tb.Helper()
	file := filepath.Join(n.dir, "files", path)
	err := os.MkdirAll(filepath.Dir(file), 0o755)
	if err == nil {
		err = os.Symlink(target, file)
	}

	if err != nil {
		tb.Fatalf("node: %v", err)
	}
}

// awaitBoot waits until systemd has completed its jobs. It logs failed units but does not fail the
// test.
func (n *Node) awaitBoot(tb engines.TB, docker bool) {
	tb.Helper()
	state := ""
	n.Await(tb, bootTimeout, "systemd", func() bool {
		state, _ = n.Try("systemctl", "is-system-running")
		state = strings.TrimSpace(state)
		return state == "running" || state == "degraded"
	})

	if state == "degraded" {
		out, _ := n.Try("systemctl", "--failed", "--no-legend", "--plain")
		tb.Logf("%s: failed units:\n%s", n.Name, out)
	}

	if docker {
		n.Run(tb, "docker", "version")
	}
}

// Await waits until cond is true, at most for timeout. The error contains description.
func (n *Node) Await(tb engines.TB, timeout time.Duration, description string, cond func() bool) {
	tb.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()

	for end := time.Now().Add(timeout); !cond(); <-tick.C {
		if time.Now().After(end) {
			tb.Fatalf("%s: %s: timeout after %s", n.Name, description, timeout)
		}
	}
}

// join is a script to run a program in the node. On cgroup v1 it also joins the node's control
// groups.
const join = `for c in /sys/fs/cgroup/*/cgroup.procs; do echo 0 > "$c"; done 2>/dev/null; exec "$@"`

// Command returns a command to run in the node, as root and with the environment of a login.
func (n *Node) Command(name string, args ...string) *exec.Cmd {
	enter := []string{"-t", n.pid, "-m", "-n", "-u", "-i", "-p", "-C", "--wdns=/", "--", "sh", "-c", join, "sh", name}
	cmd := exec.Command("nsenter", append(enter, args...)...)
	cmd.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "TERM=dumb",
	}

	return cmd
}

// Try runs a program in the node and returns its standard output. The error contains its standard
// error.
func (n *Node) Try(name string, args ...string) (string, error) {
	cmd := n.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %s %s: %w\n%s", n.Name, name, strings.Join(args, " "), err, stderr.Bytes())
	}

	return string(out), err
}

// Run runs a program in the node and returns its standard output. It fails the test after an error.
func (n *Node) Run(tb engines.TB, name string, args ...string) string {
	tb.Helper()
	out, err := n.Try(name, args...)
	if err != nil {
		tb.Fatalf("%v\n%s", err, out)
	}
	return out
}

// Path returns the path of a node's file in the mount namespace of the test.
func (n *Node) Path(inside string) string { return "/proc/" + n.pid + "/root" + inside }

// WriteFile writes a file in the node and creates its parent directories.
func (n *Node) WriteFile(tb engines.TB, path, content string, mode os.FileMode) {
	tb.Helper()
	writeFile(tb, n.Path(path), content, mode)
}

// Copy copies a file of the host into the node, including its mode.
func (n *Node) Copy(tb engines.TB, file, path string) {
	tb.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	info, err := os.Stat(file)
	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	n.WriteFile(tb, path, string(b), info.Mode())
}

func random() string {
	b := make([]byte, 5)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// tempDir creates a temporary directory. TempDir of the test has a mode without access for other
// users of the node.
func tempDir(tb engines.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "cri-node-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}

	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	return dir
}

func removeAll(tb engines.TB, dir string) {
	if err := os.RemoveAll(dir); err != nil {
		tb.Logf("node: %v", err)
	}
}

// writeScript writes the script and returns its path.
func writeScript(tb engines.TB, dir string) string {
	tb.Helper()
	file := filepath.Join(dir, "node.sh")
	writeFile(tb, file, script, 0o755)
	return file
}
