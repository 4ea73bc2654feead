// Package nodes starts whole nodes for tests: systemd as process 1 in namespaces of its own, over
// the machine's file system as a read-only layer, with Docker Engine as the machine's package
// installs it. What the machine runs, stores and configures is neither seen nor changed; what a
// test leaves ends with its node. Needs root, and Debian's packages systemd, dbus, docker.io and
// iptables.
package nodes

import (
	"bufio"
	"bytes"
	"crypto/rand"
	_ "embed" // for the script
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"cri-dockerd/test/engines"
)

//go:embed node.sh
var script string

// Gateway is the address of the network's switch, on which a test may listen (engines.In with
// Network.NetNS) and be reached by the nodes.
const Gateway = "10.89.0.1"

// Network is a switch in a network namespace of its own, to which nodes are connected. Nothing
// beyond it can be reached.
type Network struct {
	pid   string
	nodes int
}

// NewNetwork makes a network; it ends with the test.
func NewNetwork(tb engines.TB) *Network {
	tb.Helper()
	dir := tempDir(tb)
	tb.Cleanup(func() { removeAll(tb, dir) })
	return &Network{pid: hold(tb, exec.Command("unshare", "-n", "sh", write(tb, dir), "network"))}
}

// NetNS is the path of the switch's network namespace.
func (w *Network) NetNS() string { return "/proc/" + w.pid + "/ns/net" }

// Config says what a node is.
type Config struct {
	Network *Network // nil is one of its own
	// of the engine's control groups, systemd or cgroupfs; "" leaves the engine's default
	Driver   string
	NoDocker bool              // the engine is installed but neither enabled nor started
	Files    map[string]string // by path, there before systemd starts
	Hosts    map[string]string // addresses by name
	Binds    map[string]string // files and folders of the machine, by their path in the node
}

// Node is a machine of its own to all that runs in it.
type Node struct {
	Name    string // node1, node2, … in its network; the nodes know each other by name
	Address string // in the network

	dir, cgroup string
	pid         string // of process 1, as seen from outside
}

const bootDeadline = 2 * time.Minute

// Start starts a node and waits until systemd has started all units, Docker's too. It ends with the
// test.
func Start(tb engines.TB, c Config) *Node {
	tb.Helper()
	if c.Network == nil {
		c.Network = NewNetwork(tb)
	}

	c.Network.nodes++
	n := &Node{
		Name:    fmt.Sprint("node", c.Network.nodes),
		Address: fmt.Sprint("10.89.0.", 10+c.Network.nodes),
		dir:     tempDir(tb),
		cgroup:  "cri-test-node-" + random(),
	}

	for _, d := range []string{"root", "upper", "work", "own", "files"} {
		if err := os.Mkdir(filepath.Join(n.dir, d), 0o755); err != nil {
			tb.Fatalf("node: %v", err)
		}
	}

	n.prepare(tb, c)
	n.pid = hold(tb, exec.Command("unshare", "-m", "--propagation", "private", "sh", write(tb, n.dir), "guard", n.dir,
		n.cgroup, n.Name, n.Address, c.Network.pid))
	tb.Cleanup(func() {
		if tb.Failed() {
			out, _ := n.Try("journalctl", "--no-pager", "-q", "-n", "80")
			tb.Logf("end of the journal of %s:\n%s", n.Name, out)
		}
	})

	n.awaitBoot(tb, !c.NoDocker)

	return n
}

// masked are units that a node has no use for or that would change the machine.
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

// prepare writes the files with which the node starts.
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
	n.place(tb, "/etc/hosts", hosts)
	n.place(tb, "/etc/hostname", n.Name+"\n")
	n.place(tb, "/etc/machine-id", hex.EncodeToString(id)+"\n")
	n.place(tb, "/etc/resolv.conf", "nameserver "+Gateway+"\n")
	n.place(tb, "/etc/fstab", "")
	n.place(tb, "/etc/systemd/journald.conf.d/node.conf", "[Journal]\nReadKMsg=no\nRateLimitIntervalSec=0\n")
	n.link(tb, "/dev/null", "/etc/systemd/system-generators/systemd-sysv-generator")
	for _, u := range masked {
		n.link(tb, "/dev/null", "/etc/systemd/system/"+u)
	}

	if c.Driver != "" {
		b, err := json.Marshal(map[string]any{"exec-opts": []string{"native.cgroupdriver=" + c.Driver}})
		if err != nil {
			tb.Fatalf("node: %v", err)
		}
		n.place(tb, "/etc/docker/daemon.json", string(b))
	}

	if !c.NoDocker {
		n.link(tb, "/lib/systemd/system/docker.service", "/etc/systemd/system/multi-user.target.wants/docker.service")
		n.link(tb, "/lib/systemd/system/containerd.service",
			"/etc/systemd/system/multi-user.target.wants/containerd.service")
		n.link(tb, "/lib/systemd/system/docker.socket", "/etc/systemd/system/sockets.target.wants/docker.socket")
	}

	runc, err := os.ReadFile("/usr/sbin/runc")
	if err != nil {
		tb.Fatalf("node: %v; install docker.io", err)
	}

	n.place(tb, "/usr/sbin/runc.real", string(runc))
	engines.Build(tb, filepath.Join(n.dir, "files/usr/sbin/runc"), "cri-dockerd/test/engines/helper",
		"-X main.runc=/usr/sbin/runc.real", false)
	for path, content := range c.Files {
		n.place(tb, path, content)
	}

	binds := ""
	for path, file := range c.Binds {
		binds += file + " " + path + "\n"
	}

	put(tb, filepath.Join(n.dir, "binds"), binds, 0o644)
}

// place writes a file of the node to be.
func (n *Node) place(tb engines.TB, path, content string) {
	tb.Helper()
	put(tb, filepath.Join(n.dir, "files", path), content, 0o755)
}

// put writes a file, its folders too.
func put(tb engines.TB, file, content string, mode os.FileMode) {
	tb.Helper()
	err := os.MkdirAll(filepath.Dir(file), 0o755)
	if err == nil {
		err = os.WriteFile(file, []byte(content), mode)
	}

	if err != nil {
		tb.Fatalf("node: %v", err)
	}
}

// link makes a symbolic link of the node to be.
func (n *Node) link(tb engines.TB, target, path string) {
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

// awaitBoot waits until systemd has no job left. A unit that failed is told of, and for the test to
// judge.
func (n *Node) awaitBoot(tb engines.TB, docker bool) {
	tb.Helper()
	state := ""
	n.Await(tb, bootDeadline, "systemd", func() bool {
		state, _ = n.Try("systemctl", "is-system-running")
		state = strings.TrimSpace(state)
		return state == "running" || state == "degraded"
	})

	if state == "degraded" {
		out, _ := n.Try("systemctl", "--failed", "--no-legend", "--plain")
		tb.Logf("%s: these units failed:\n%s", n.Name, out)
	}

	if docker {
		n.Run(tb, "docker", "version")
	}
}

// Await waits until cond is true, at most for limit; what is its name in the error.
func (n *Node) Await(tb engines.TB, limit time.Duration, what string, cond func() bool) {
	tb.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()

	for end := time.Now().Add(limit); !cond(); <-tick.C {
		if time.Now().After(end) {
			tb.Fatalf("%s: %s: not within %s", n.Name, what, limit)
		}
	}
}

// join runs a program in the node's namespaces and, on cgroup v1, in its control groups.
const join = `for c in /sys/fs/cgroup/*/cgroup.procs; do echo 0 > "$c"; done 2>/dev/null; exec "$@"`

// Command is a program to be run in the node, as root and with a login's environment.
func (n *Node) Command(name string, args ...string) *exec.Cmd {
	enter := []string{"-t", n.pid, "-m", "-n", "-u", "-i", "-p", "-C", "--wdns=/", "--", "sh", "-c", join, "sh", name}
	cmd := exec.Command("nsenter", append(enter, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
		"LANG=C.UTF-8", "TERM=dumb"}
	return cmd
}

// Try runs a program in the node and returns its output; the error holds what it wrote to standard
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

// Run runs a program in the node, which must succeed, and returns its output.
func (n *Node) Run(tb engines.TB, name string, args ...string) string {
	tb.Helper()
	out, err := n.Try(name, args...)
	if err != nil {
		tb.Fatalf("%v\n%s", err, out)
	}
	return out
}

// Path is where a file of the node is seen from outside.
func (n *Node) Path(inside string) string { return "/proc/" + n.pid + "/root" + inside }

// NetNS is the path of the node's network namespace.
func (n *Node) NetNS() string { return "/proc/" + n.pid + "/ns/net" }

// WriteFile writes a file in the node, and its folders.
func (n *Node) WriteFile(tb engines.TB, path, content string, mode os.FileMode) {
	tb.Helper()
	put(tb, n.Path(path), content, mode)
}

// Copy copies a file of the machine into the node with its mode.
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

// tempDir makes a folder that is not below the test's own, whose mode would keep other users of the
// node out.
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

// write writes the script and returns its path.
func write(tb engines.TB, dir string) string {
	tb.Helper()
	file := filepath.Join(dir, "node.sh")
	put(tb, file, script, 0o755)
	return file
}

// hold starts a guard, in a session of its own so that an interrupt does not take it before it has
// cleaned up, and ends it with the test by ending its standard input. It returns the PID that the
// guard tells.
func hold(tb engines.TB, cmd *exec.Cmd) string {
	tb.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	out, told, err := os.Pipe()
	if err != nil {
		tb.Fatalf("node: %v", err)
	}
	defer out.Close()

	cmd.Stdout = told
	err = cmd.Start()
	told.Close()
	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	tb.Cleanup(func() { end(tb, stdin, cmd) })
	line, err := bufio.NewReader(out).ReadString('\n')
	pid, ok := strings.CutPrefix(strings.TrimSpace(line), "ready ")
	if err != nil || !ok {
		tb.Fatalf("node: the namespaces were not set up (%q, %v); tests need root", line, err)
	}

	return pid
}

func end(tb engines.TB, stdin io.Closer, cmd *exec.Cmd) {
	stdin.Close()
	if err := cmd.Wait(); err != nil {
		tb.Logf("end of a node or network: %v", err)
	}
}
