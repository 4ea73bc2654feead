// Package engines starts private Docker engines for tests. Each has its own mount, network and PID
// namespaces, data, sockets and cgroups. Tests never touch the host's engine, and leftovers of a
// test end with its engine.
package engines

import (
	"bufio"
	"crypto/rand"
	_ "embed" // for the set-up script
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"
)

// TB is the harness's part of testing.TB; a TestMain or a benchmark has its own.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Cleanup(func())
	Failed() bool
}

//go:embed setup.sh
var setup string

// Engine is one private engine and its namespaces.
type Engine struct {
	Version      Version
	Dir          string // of all its files, seen inside and outside
	Socket       string // of Docker
	CgroupParent string // of all containers

	pid      int // of its process 1, from outside
	stdin    io.Closer
	docker   *exec.Cmd
	bin      string // folder of the engine's programs, "" for the system's
	flags    []string
	attached bool // the machine's own engine
}

// nodeAddress is the address of the engine's node, from setup.sh.
const nodeAddress = "192.0.2.1"

const startDeadline = 60 * time.Second

// Start starts an engine with dockerd's further flags; it ends with the test.
func Start(tb TB, v Version, flags ...string) *Engine {
	tb.Helper()
	return StartPrepared(tb, v, func(*Engine) {}, flags...)
}

// StartPrepared is Start with a prepare function, called after the namespaces exist and before
// dockerd starts.
func StartPrepared(tb TB, v Version, prepare func(*Engine), flags ...string) *Engine {
	tb.Helper()
	dir, err := os.MkdirTemp("", "cri-engine-")
	if err == nil {
		err = os.Chmod(dir, 0o711) // the root user of a user namespace has no rights here
	}

	if err != nil {
		tb.Fatalf("engine: %v", err)
	}

	e := &Engine{
		Version:      v,
		Dir:          dir,
		Socket:       filepath.Join(dir, "docker.sock"),
		CgroupParent: "/cri-test-" + random(),
		bin:          Programs(tb, v),
		flags:        flags,
	}

	tb.Cleanup(func() { e.end(tb) })
	e.namespaces(tb)
	prepare(e)
	e.startDocker(tb)

	return e
}

// Cache returns the directory for expensive builds.
func Cache() string {
	base, err := os.UserCacheDir()
	if err != nil {
		base = os.TempDir()
	}
	return filepath.Join(base, "cri-dockerd-test")
}

func random() string {
	b := make([]byte, 5)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// namespaces creates the node. Its process 1 ends with the test process, and with it all others.
func (e *Engine) namespaces(tb TB) {
	tb.Helper()
	runc := "/usr/sbin/runc"
	if e.bin != "" {
		runc = filepath.Join(e.bin, "runc")
	}

	helper := filepath.Join(e.Dir, "runc-wrapper")
	Build(tb, helper, "cri-dockerd/test/engines/helper", "-X main.runc="+runc, false)
	e.extraPrograms(tb, helper)
	script := filepath.Join(e.Dir, "setup.sh")
	WriteProgram(tb, script, setup)
	cmd := exec.Command("unshare", "-m", "-n", "-p", "--fork", "--mount-proc", "--propagation", "private", "sh", script,
		e.Dir, helper, e.bin)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatalf("engine: %v", err)
	}

	e.stdin = stdin
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatalf("engine: %v", err)
	}

	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		tb.Fatalf("engine: %v", err)
	}

	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		tb.Fatalf("engine: the namespaces were not set up (%q, %v); tests need root", line, err)
	}

	go func() { _ = cmd.Wait() }()
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
	if err != nil {
		tb.Fatalf("engine: %v", err)
	}

	if e.pid, err = strconv.Atoi(strings.TrimSpace(string(children))); err != nil {
		tb.Fatalf("engine: %v", err)
	}
}

// ShimHandler is a containerd shim that engines from 23 on find by its name: the runc shim under
// another name.
const ShimHandler = "io.containerd.test.v2"

// extraPrograms creates the first directory in the engine's PATH, with the runc wrapper and the
// shim of ShimHandler.
func (e *Engine) extraPrograms(tb TB, wrapper string) {
	tb.Helper()
	shim := "/usr/bin/containerd-shim-runc-v2"
	if e.bin != "" {
		shim = filepath.Join(e.bin, "containerd-shim-runc-v2")
	}

	bin := filepath.Join(e.Dir, "bin")
	err := os.Mkdir(bin, 0o755)
	for name, program := range map[string]string{"runc": wrapper, "containerd-shim-test-v2": shim} {
		if err == nil {
			err = os.Symlink(program, filepath.Join(bin, name))
		}
	}

	if err != nil {
		tb.Fatalf("engine: %v", err)
	}

	for _, program := range ShimPrograms {
		Build(tb, filepath.Join(bin, program), "cri-dockerd/cmd/"+program, "", false)
	}
}

// InstallCRIU adds criu to the programs that containerd and its shims find (hack/criu.sh).
func (e *Engine) InstallCRIU(tb TB) {
	tb.Helper()
	program := filepath.Join(Cache(), "criu", "criu")
	_, err := os.Stat(program)
	if err == nil {
		err = os.Symlink(program, filepath.Join(e.Dir, "bin", "criu"))
	}
	if err != nil {
		tb.Fatalf("criu: %v; run hack/criu.sh", err)
	}
}

// ShimPrograms are the programs of this project's containerd shim. containerd finds the first in
// its PATH.
var ShimPrograms = []string{"containerd-shim-cri-dockerd-v1", "containerd-shim-cri-dockerd-server"}

// end kills all processes in the namespaces and removes files and cgroups.
func (e *Engine) end(tb TB) {
	if tb.Failed() {
		tail(tb, filepath.Join(e.Dir, "docker.log"), 20)
	}
	if e.stdin != nil {
		e.stdin.Close()
	}

	ended := func() bool { _, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", e.pid)); return err != nil }
	if e.pid != 0 && !Within(20*time.Second, ended) {
		tb.Logf("engine %s did not end", e.Dir)
	}

	var err error
	if !Within(10*time.Second, func() bool { err = os.RemoveAll(e.Dir); return err == nil }) {
		tb.Logf("remove %s: %v", e.Dir, err)
	}

	removeCgroups(strings.TrimPrefix(e.CgroupParent, "/"))
	removeHidden(tb, e.CgroupParent)
}

// removeHidden removes an engine's leftovers in cgroup hierarchies mounted only by setup.sh.
func removeHidden(tb TB, name string) {
	if _, err := os.Stat("/sys/fs/cgroup/memory"); err != nil {
		return // cgroup v2
	}

	script := `mount -t tmpfs none /mnt
		while read -r h _ _ enabled; do
			[ "$enabled" = 1 ] && [ ! -e "/sys/fs/cgroup/$h" ] && mkdir "/mnt/$h" && mount -t cgroup -o "$h" none "/mnt/$h" 2>/dev/null || continue
			[ ! -d "/mnt/$h$1" ] || find "/mnt/$h$1" -depth -type d -exec rmdir {} \; || exit 1
		done < /proc/cgroups`
	if out, err := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh",
		name).CombinedOutput(); err != nil {
		tb.Logf("remove cgroups of unmounted hierarchies: %v\n%s", err, out)
	}
}

// removeCgroups removes a cgroup with its descendants in every hierarchy.
func removeCgroups(name string) {
	roots, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	roots = append(roots, "/sys/fs/cgroup/"+name)
	for _, root := range roots {
		Within(2*time.Second, func() bool {
			var dirs []string
			_ = filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, p)
				}
				return nil
			})

			for i := len(dirs) - 1; i >= 0; i-- {
				_ = os.Remove(dirs[i])
			}

			_, err := os.Stat(root)

			return errors.Is(err, os.ErrNotExist)
		})
	}
}

// DataRoot returns dockerd's data directory.
func (e *Engine) DataRoot() string { return filepath.Join(e.Dir, "data") }

// Command returns a command to run inside the namespaces.
func (e *Engine) Command(name string, args ...string) *exec.Cmd {
	if e.attached {
		return exec.Command(name, args...)
	}

	cmd := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(e.pid), "-m", "-n", "-p", "--", name},
		args...)...)
	cmd.Env = append(os.Environ(), "HOME="+filepath.Join(e.Dir, "root/root"),
		"PATH="+filepath.Join(e.Dir, "bin")+":"+e.bin+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	return cmd
}

// Path returns the outside path of a file in the namespaces.
func (e *Engine) Path(inside string) string {
	if e.attached {
		return inside
	}
	return fmt.Sprintf("/proc/%d/root%s", e.pid, inside)
}

// Plugins is the directory of the newest standard CNI plugins and flannel's, built by
// hack/cni-plugins.sh.
func Plugins() string { return filepath.Join(Cache(), "cni") }

// Docker returns a client of the engine.
func (e *Engine) Docker(tb TB) *client.Client {
	tb.Helper()
	c, err := client.New(client.WithHost("unix://" + e.Socket))
	if err != nil {
		tb.Fatalf("docker client: %v", err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

// Within waits up to d for cond and reports whether it became true.
func Within(d time.Duration, cond func() bool) bool {
	deadline := time.Now().Add(d)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()

	for !cond() {
		if time.Now().After(deadline) {
			return false
		}
		<-tick.C
	}

	return true
}

// tail logs the end of a file.
func tail(tb TB, file string, lines int) {
	b, err := os.ReadFile(file)
	if err != nil {
		return
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	tb.Logf("end of %s:\n%s", filepath.Base(file), strings.Join(all[max(0, len(all)-lines):], "\n"))
}
