// Package engines starts private Docker engines for tests. Each has its own mount, network and PID
// namespaces, data, sockets and cgroups. Tests never touch the host's engine, and leftovers of a
// test end with its engine.
package engines

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	_ "embed" // for the set-up script
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
)

// Version is a version of the engine under test.
type Version string

const (
	V20 Version = "20.10" // Debian's package docker.io
	V29 Version = "29"    // built from Go modules by hack/docker29.sh
)

// Versions returns the engines to test on: both, or the one in the environment variable ENGINE.
func Versions() []Version {
	if v := os.Getenv("ENGINE"); v != "" {
		return []Version{Version(v)}
	}
	return []Version{V20, V29}
}

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

	pid    int // of its process 1, from outside
	stdin  io.Closer
	docker *exec.Cmd
	bin    string // folder of the engine's programs, "" for the system's
	flags  []string
}

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
		flags:        flags,
	}
	if v == V29 {
		e.bin = filepath.Join(Cache(), "docker-29")
		if _, err := os.Stat(filepath.Join(e.bin, "dockerd")); err != nil {
			tb.Fatalf("Docker 29 is not built; run hack/docker29.sh: %v", err)
		}
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
		e.Dir, helper)
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
}

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

// Begin starts dockerd without waiting for it.
func (e *Engine) Begin(tb TB) {
	tb.Helper()
	args := []string{
		"-H", "unix://" + e.Socket, "--data-root", e.DataRoot(), "--exec-root", "/run/docker", "--pidfile",
		"/run/docker.pid",
		"--cgroup-parent", e.CgroupParent, "--add-runtime", "wrapped=" + filepath.Join(e.Dir, "runc-wrapper"),
		"--default-runtime", "wrapped",
		"--live-restore", "--userland-proxy=false", "--exec-opt", "native.cgroupdriver=cgroupfs",
	}

	e.docker = e.background(tb, "docker", "dockerd", append(args, e.flags...)...)
}

// startDocker starts dockerd in the namespaces and waits for its first response.
func (e *Engine) startDocker(tb TB) {
	tb.Helper()
	e.Begin(tb)
	ready := func() bool {
		c, err := client.New(client.WithHost("unix://" + e.Socket))
		if err != nil {
			return false
		}
		defer c.Close()

		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()

		_, err = c.Info(ctx, client.InfoOptions{})

		return err == nil
	}
	if !Within(startDeadline, ready) {
		tail(tb, filepath.Join(e.Dir, "docker.log"), 30)
		tb.Fatalf("engine %s is not responding", e.Version)
	}
}

// background starts a program in the namespaces with its output in <name>.log and its PID, inside
// the namespaces, in <name>.pid.
func (e *Engine) background(tb TB, name, program string, args ...string) *exec.Cmd {
	tb.Helper()
	script := fmt.Sprintf(`echo $$ > %s/%s.pid; exec "$@" >> %s/%s.log 2>&1`, e.Dir, name, e.Dir, name)
	cmd := e.Command("sh", append([]string{"-c", script, "sh", program}, args...)...)
	if err := cmd.Start(); err != nil {
		tb.Fatalf("start %s: %v", program, err)
	}

	go func() { _ = cmd.Wait() }()

	return cmd
}

// Background starts a program in the namespaces. Its output goes to <name>.log in Dir. It ends with
// the engine.
func (e *Engine) Background(tb TB, name, program string, args ...string) {
	tb.Helper()
	e.background(tb, name, program, args...)
}

// KillBackground kills a program of Background with SIGKILL.
func (e *Engine) KillBackground(tb TB, name string) {
	tb.Helper()
	e.signal(tb, name, "KILL")
}

// signal sends a signal to a program. For KILL, it waits for the end of the process.
func (e *Engine) signal(tb TB, name, signal string) {
	tb.Helper()
	pid, err := os.ReadFile(filepath.Join(e.Dir, name+".pid"))
	if err != nil {
		tb.Fatalf("%s: %v", name, err)
	}

	p := strings.TrimSpace(string(pid))
	if out, err := e.Command("kill", "-"+signal, p).CombinedOutput(); err != nil {
		tb.Logf("kill %s: %v %s", name, err, out)
	}

	ended := func() bool { return e.Command("test", "-e", "/proc/"+p).Run() != nil }
	if !Within(20*time.Second, ended) {
		tb.Fatalf("%s does not end on %s", name, signal)
	}
}

// Running reports whether dockerd is running, paused or not.
func (e *Engine) Running() bool { return e.runs("docker") }

// runs reports whether a program of background is running.
func (e *Engine) runs(name string) bool {
	pid, err := os.ReadFile(filepath.Join(e.Dir, name+".pid"))
	if err != nil || len(bytes.TrimSpace(pid)) == 0 {
		return true // it is about to start
	}
	_, err = os.Stat(e.Path("/proc/" + strings.TrimSpace(string(pid))))
	return err == nil
}

// Started reports whether the last started dockerd has its process.
func (e *Engine) Started() bool { return e.started("docker") }

func (e *Engine) started(name string) bool {
	pid, err := os.ReadFile(filepath.Join(e.Dir, name+".pid"))
	return err == nil && bytes.HasSuffix(pid, []byte("\n"))
}

// Clear removes the leftovers of a killed dockerd, so that another can start.
func (e *Engine) Clear(tb TB) {
	tb.Helper()
	_ = os.Remove(e.Socket)
	_ = os.Remove(filepath.Join(e.Dir, "docker.pid"))
	if out, err := e.Command("rm", "-f", "/run/docker.pid").CombinedOutput(); err != nil {
		tb.Logf("%v: %s", err, out)
	}
}

// Signal sends dockerd a signal without ending it: STOP or CONT.
func (e *Engine) Signal(tb TB, signal string) {
	tb.Helper()
	pid, err := os.ReadFile(filepath.Join(e.Dir, "docker.pid"))
	if err != nil {
		tb.Fatalf("docker: %v", err)
	}

	if out, err := e.Command("kill", "-"+signal, strings.TrimSpace(string(pid))).CombinedOutput(); err != nil {
		tb.Fatalf("kill -%s dockerd: %v\n%s", signal, err, out)
	}

	if signal == "CONT" { // nsenter(1) has stopped itself with its child dockerd
		if err := e.docker.Process.Signal(syscall.SIGCONT); err != nil {
			tb.Fatalf("continue nsenter: %v", err)
		}
	}
}

// CPU returns the CPU time of dockerd and its containerd, of all threads together (schedstat,
// Documentation/scheduler/sched-stats.rst).
func (e *Engine) CPU(tb TB) time.Duration {
	tb.Helper()
	script := `d=$(cat ` + e.Dir + `/docker.pid)
		for p in $d $(cat /proc/$d/task/*/children); do
			[ "$(cat /proc/$p/comm)" = dockerd ] || [ "$(cat /proc/$p/comm)" = containerd ] || continue
			cat /proc/$p/task/*/schedstat
		done`

	out, err := e.Command("sh", "-c", script).Output()
	sum, parseErr := sumSchedstat(string(out))
	if err != nil || parseErr != nil || sum == 0 {
		tb.Fatalf("CPU of the engine: %q, %v, %v", out, err, parseErr)
	}

	return sum
}

// sumSchedstat adds up the first column, nanoseconds on a processor.
func sumSchedstat(lines string) (sum time.Duration, err error) {
	for line := range strings.Lines(lines) {
		ran, _, _ := strings.Cut(line, " ")
		ns, err := strconv.ParseInt(ran, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%q: %w", line, err)
		}
		sum += time.Duration(ns)
	}

	return sum, nil
}

// Kill kills dockerd with SIGKILL. Its containers keep running (live-restore).
func (e *Engine) Kill(tb TB) {
	tb.Helper()
	e.signal(tb, "docker", "KILL")
}

// Stop stops dockerd gracefully. Its containers keep running (live-restore).
func (e *Engine) Stop(tb TB) {
	tb.Helper()
	e.signal(tb, "docker", "TERM")
}

// Restart starts dockerd after Kill or Stop.
func (e *Engine) Restart(tb TB) {
	tb.Helper()
	e.Clear(tb)
	e.startDocker(tb)
}

// Command returns a command to run inside the namespaces.
func (e *Engine) Command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(e.pid), "-m", "-n", "-p", "--", name},
		args...)...)
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(e.Dir, "bin")+":"+e.bin+
		":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	return cmd
}

// Path returns the outside path of a file in the namespaces.
func (e *Engine) Path(inside string) string { return fmt.Sprintf("/proc/%d/root%s", e.pid, inside) }

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

// Plugins is the directory of the newest standard CNI plugins and flannel's, built by
// hack/cni-plugins.sh.
func Plugins() string { return filepath.Join(Cache(), "cni") }

// NetNS returns the outside path of a network namespace: that of a file inside, or the engine's own
// with "".
func (e *Engine) NetNS(inside string) string {
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

// builds caches each built program for the test process.
var builds sync.Map

// Race reports whether the tests, and therefore the daemon, run with the race detector.
func Race() bool { return race }

// Build builds one of our programs at the path out. The program is static or, with detect and in
// tests with the race detector, has the race detector.
func Build(tb TB, out, pkg, ldflags string, detect bool) {
	tb.Helper()
	once, _ := builds.LoadOrStore(fmt.Sprint(pkg, ldflags, detect), sync.OnceValues(func() ([]byte, error) {
		tmp, err := os.MkdirTemp("", "cri-build-")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(tmp)

		bin := filepath.Join(tmp, "program")
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w "+ldflags, "-o", bin, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if race && detect {
			cmd = exec.Command("go", "build", "-race", "-trimpath", "-ldflags", ldflags, "-o", bin, pkg)
		}
		if msg, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w\n%s", err, msg)
		}

		return os.ReadFile(bin)
	}))

	b, err := once.(func() ([]byte, error))()
	if err == nil {
		err = install(out, b)
	}

	if err != nil {
		tb.Fatalf("build %s: %v", pkg, err)
	}
}

// WriteProgram writes a script or a program to execute from this path.
func WriteProgram(tb TB, file, content string) {
	tb.Helper()
	if err := install(file, []byte(content)); err != nil {
		tb.Fatalf("write a program: %v", err)
	}
}

// install writes a program in small pieces, like package managers. Kernels from 6.18 on map a file
// written at once in equally large pieces, and these would count as the process's memory. No child
// may be forked meanwhile: it would hold the file open for writing until its own execve, and the
// kernel would refuse to execute the file (ETXTBSY).
func install(file string, program []byte) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()

	f, err := os.OpenFile(file, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}

	for piece := range slices.Chunk(program, 32<<10) {
		if _, err := f.Write(piece); err != nil {
			return errors.Join(err, f.Close())
		}
	}

	return f.Close()
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
