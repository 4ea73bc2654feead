// Package chaos runs pods like a kubelet does, while a seeded schedule of faults breaks the daemon,
// the engine, the network plugins and the disks around it. Afterwards a checker compares the
// engine, the kernel, the network's reservations, the logs and the daemon's answers. The package
// consists of tests only. See TestChaos for the course of a seed and TestCrashPoints for kills at
// every step of a call.
package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/proxy"
)

// lab is a node in which every part can be broken.
type lab struct {
	eng    *engines.Engine
	daemon *engines.Daemon
	proxy  *proxy.Proxy
	docker *client.Client // connected directly, without the proxy
	cni    *plugins
	tb     *reporter

	logs  string // directory of the pods' logs, a separate file system
	state string // directory for the containers' records of printed lines
	conf  string // directory of CNI configurations

	processes     sync.Mutex  // held while a process is killed or started
	dockerdKilled atomic.Bool // at least once

	shims     sync.Mutex      // guards the fields below
	killed    map[string]bool // existing containers when the engine was killed
	lost      map[string]bool // containers lost by the engine at the last check
	permitted map[string]bool // lost containers with leftovers
}

// Sizes of the file systems to fill, in bytes.
const (
	logDisk    = "64m"
	engineDisk = "512m"
)

// newLab starts an engine with its data on a small disk, and a daemon with CNI behind a proxy.
func newLab(t *testing.T, v engines.Version, flags ...string) *lab {
	t.Helper()
	l := &lab{tb: &reporter{T: t}, killed: map[string]bool{}, permitted: map[string]bool{}}
	l.eng = engines.StartPrepared(t, v, func(e *engines.Engine) {
		l.logs, l.state = filepath.Join(e.Dir, "logs"), filepath.Join(e.Dir, "state")
		for dir, size := range map[string]string{l.logs: logDisk, e.DataRoot(): engineDisk} {
			mount(t, e, dir, size)
		}
	}, flags...)
	if err := os.Mkdir(l.state, 0o755); err != nil {
		t.Fatal(err)
	}

	l.eng.ImportBusybox(t)
	_, err := l.inside("docker", "-H", "unix://"+l.eng.Socket, "save", "-o", l.saved(), engines.Busybox)
	if err != nil {
		t.Fatal(err)
	}

	l.docker = l.eng.Docker(t)

	l.proxy = proxy.Start(t, filepath.Join(l.eng.Dir, "proxy.sock"), l.eng.Socket)
	l.cni = newPlugins(t, filepath.Join(l.eng.Dir, "cni"))
	l.conf = filepath.Join(l.eng.Dir, "net.d")
	err = os.Mkdir(l.conf, 0o755)
	if err == nil {
		err = os.WriteFile(l.confFile(), []byte(network), 0o644)
	}

	if err != nil {
		t.Fatal(err)
	}

	l.daemon = l.eng.Daemon(t,
		"--docker-endpoint=unix://"+l.proxy.Socket, "--network-plugin=cni", "--container-log=cri",
		"--cni-conf-dir="+l.conf, "--cni-bin-dir="+l.cni.dir, "--pod-cidr=")

	return l
}

// network is the pods' network.
const network = `{"cniVersion":"1.0.0","name":"chaos","plugins":[
	{"type":"bridge","bridge":"chaos0","isGateway":true,"ipMasq":true,"hairpinMode":true,
		"ipam":{"type":"host-local","ranges":[[{"subnet":"10.66.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
	{"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}`

func (l *lab) confFile() string { return filepath.Join(l.conf, "10-chaos.conflist") }

// saved is the archive of the containers' image.
func (l *lab) saved() string { return filepath.Join(l.eng.Dir, "busybox.tar") }

// filler is the file that fills the disk of a directory.
func (l *lab) filler(dir string) string { return l.eng.Path(filepath.Join(dir, "filler")) }

// leases is the directory of host-local's reservations.
func (l *lab) leases() string { return filepath.Join(l.daemon.LeaseDir, "chaos") }

func mount(t *testing.T, e *engines.Engine, dir, size string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o711); err != nil {
		t.Fatal(err)
	}

	out, err := e.Command("mount", "-t", "tmpfs", "-o", "mode=755,size="+size, "tmpfs", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("mount %s: %v\n%s", dir, err, out)
	}
}

// inside runs a command in the engine's namespaces.
func (l *lab) inside(name string, args ...string) (string, error) {
	out, err := l.eng.Command(name, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// killDaemon kills the daemon; supervise restarts it.
func (l *lab) killDaemon() {
	l.processes.Lock()
	defer l.processes.Unlock()
	if l.daemon.Running() {
		l.daemon.Kill(l.tb)
	}
}

// killEngine kills dockerd; supervise restarts it.
func (l *lab) killEngine() {
	l.processes.Lock()
	defer l.processes.Unlock()
	if l.eng.Running() {
		l.dockerdKilled.Store(true)
		l.eng.Kill(l.tb)
	}
}

// supervise restarts the daemon and dockerd after they have ended, like systemd, until ctx ends.
func (l *lab) supervise(ctx context.Context, down func() time.Duration) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()

	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}

		dead := !l.eng.Running() || !l.daemon.Running()
		if !dead {
			continue
		}

		select {
		case <-ctx.Done():
			return
		case <-time.After(down()):
		}

		l.revive()
	}
}

// revive starts the daemon and dockerd if they are not running.
func (l *lab) revive() {
	l.processes.Lock()
	defer l.processes.Unlock()

	if !l.eng.Running() {
		l.eng.Clear(l.tb)
		// A dockerd started with a full disk forgets running containers ("failed to register
		// container" in its log), and no longer lists them.
		if err := os.Remove(l.filler(l.eng.DataRoot())); err != nil && !errors.Is(err, os.ErrNotExist) {
			l.tb.Errorf("%v", err)
		}
		l.eng.Begin(l.tb)
	}

	if !l.daemon.Running() {
		l.daemon.Start(l.tb)
	}

	started := func() bool { return l.eng.Started() && l.daemon.Started() }
	if !engines.Within(20*time.Second, started) {
		l.tb.Errorf("the daemon or dockerd could not be started")
	}
}

// reporter is the TB of goroutines other than the test's.
type reporter struct{ *testing.T }

// Fatalf fails the test and ends the goroutine.
func (r *reporter) Fatalf(format string, args ...any) {
	r.T.Helper()
	r.Errorf(format, args...)
	runtime.Goexit()
}

// process is a process in the node's namespaces.
type process struct {
	pid     string // inside the namespaces
	parent  string // the parent's PID, inside the namespaces
	name    string
	cmdline string
	cgroup  string // ID of its container, "" for none
}

// inContainer finds the ID of a container in /proc/<pid>/cgroup.
var inContainer = regexp.MustCompile(`/([0-9a-f]{64})\b`)

// list returns the processes of the node.
func (l *lab) list() ([]process, error) {
	proc := l.eng.Path("/proc")
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}

	var all []process
	for _, e := range entries {
		if strings.Trim(e.Name(), "0123456789") != "" {
			continue
		}

		dir := filepath.Join(proc, e.Name())
		comm, err := os.ReadFile(filepath.Join(dir, "comm"))
		cmdline, err2 := os.ReadFile(filepath.Join(dir, "cmdline"))
		cgroup, err3 := os.ReadFile(filepath.Join(dir, "cgroup"))
		stat, err4 := os.ReadFile(filepath.Join(dir, "stat"))
		if errors.Join(err, err2, err3, err4) != nil {
			continue // the process has ended
		}

		p := process{
			pid:     e.Name(),
			name:    strings.TrimSpace(string(comm)),
			cmdline: strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " ")),
			parent:  parentOf(string(stat)),
		}
		if m := inContainer.FindSubmatch(cgroup); m != nil {
			p.cgroup = string(m[1])
		}

		all = append(all, p)
	}

	return all, nil
}

// parentOf returns the parent in /proc/<pid>/stat, the second field after the name in brackets. The
// name may contain anything (proc_pid_stat(5)).
func parentOf(stat string) string {
	if f := strings.Fields(stat[strings.LastIndex(stat, ")")+1:]); len(f) > 1 {
		return f[1]
	}
	return ""
}

// question is sent by the stand-in for a CNI plugin before and after the real plugin runs.
type question struct {
	Plugin, Command, Container string
	After, Failed              bool
}

// plugins are the CNI plugins of a lab. Each is a stand-in, built from directory plugin, that asks
// the test for instructions.
type plugins struct {
	dir string

	mu      sync.Mutex // guards the fields below
	decide  func(question) string
	changed chan struct{}   // closed and renewed by answer
	broken  map[string]bool // containers with an incomplete DEL
}

// isBroken reports whether a fault made host-local's DEL of a container fail, or the bridge
// plugin's DEL has failed by itself, for instance without host-local.
func (p *plugins) isBroken(container string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.broken[container]
}

// hang makes a plugin wait for another decision.
const hang = "hang"

// newPlugins installs the plugins in dir.
func newPlugins(t *testing.T, dir string) *plugins {
	t.Helper()
	p := &plugins{dir: dir, changed: make(chan struct{}), broken: map[string]bool{}}
	program := dir + ".program"
	engines.Build(t, program, "cri-dockerd/test/chaos/plugin", "", false)
	err := errors.Join(os.Mkdir(dir, 0o755), os.Symlink(engines.Plugins(), dir+".real"))
	for _, name := range []string{"bridge", "host-local", "portmap", "loopback"} {
		if err == nil {
			err = os.Link(program, filepath.Join(dir, name))
		}
	}

	var listener net.Listener
	if err == nil {
		listener, err = net.Listen("unix", dir+".sock")
	}

	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		p.answer(nil)
		listener.Close()
	})

	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go p.serve(conn)
		}
	}()

	return p
}

// answer sets the plugins' behavior from now on; nil restores the normal one. Hanging plugins
// continue.
func (p *plugins) answer(decide func(question) string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.decide = decide
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *plugins) serve(conn net.Conn) {
	defer conn.Close()

	var q question
	if err := json.NewDecoder(conn).Decode(&q); err != nil {
		return
	}

	p.mu.Lock()
	decide, changed := p.decide, p.changed
	if q.Command == "DEL" && q.Plugin == "bridge" && q.Failed {
		p.broken[q.Container] = true
	}

	p.mu.Unlock()
	if decide == nil || q.Command == "VERSION" {
		return
	}

	answer := decide(q)
	if answer != "" && q.Plugin == "host-local" && q.Command == "DEL" {
		p.mu.Lock()
		p.broken[q.Container] = true
		p.mu.Unlock()
	}

	if answer == hang {
		<-changed
		return
	}

	_, _ = conn.Write([]byte(answer))
}
