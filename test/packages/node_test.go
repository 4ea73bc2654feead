package packages

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

const timeout = 2 * time.Minute

// machine is a node with helpers of the tests.
type machine struct {
	*nodes.Node
	cri *engines.Daemon
}

// network is a configuration of the standard CNI plugins.
const network = `{"cniVersion": "1.0.0", "name": "test", "plugins": [{"type": "bridge", "bridge": "cni0",
	"isGateway": true, "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`

// start starts a node without CNI and copies the packages of the versions to it.
func start(t *testing.T, versions ...string) machine {
	t.Helper()
	n := nodes.Start(t, nodes.Config{})
	prepareNode(t, n)
	for _, v := range versions {
		dir := packaged(t, v, runtime.GOARCH)
		n.Copy(t, onlyFile(t, dir, "*.deb"), "/tmp/"+v+".deb")
		n.Copy(t, onlyFile(t, dir, "*.rpm"), "/tmp/"+v+".rpm")
	}

	return machine{n, engines.Connect(t, "unix://"+n.Path("/run/cri-dockerd.sock"))}
}

// prepareNode removes the trigger of an unneeded index of all manual pages from a node.
func prepareNode(t *testing.T, n *nodes.Node) {
	t.Helper()
	n.Run(t, "rm", "-f", "/var/lib/man-db/auto-update")
}

// apt installs packages from files without prompts and without a network.
func (m machine) apt(t *testing.T, args ...string) string {
	t.Helper()
	return m.Run(t, "env", append([]string{"DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "-q"}, args...)...)
}

// property returns a property of a unit.
func (m machine) property(t *testing.T, unit, name string) string {
	t.Helper()
	return strings.TrimSpace(m.Run(t, "systemctl", "show", "--value", "-p", name, unit))
}

// awaitActive waits until units have started successfully.
func (m machine) awaitActive(t *testing.T, units ...string) {
	t.Helper()
	for _, u := range units {
		state := ""
		m.Await(t, timeout, u+" is active", func() bool {
			state = m.property(t, u, "ActiveState")
			return state == "active" || state == "failed"
		})

		if state != "active" {
			t.Errorf("%s: %s", u, state)
		}
	}
}

// awaitStatus waits for a text in the unit's status.
func (m machine) awaitStatus(t *testing.T, want string) {
	t.Helper()
	m.Await(t, timeout, "status "+want, func() bool {
		return strings.Contains(m.property(t, "cri-docker.service", "StatusText"), want)
	})
}

var all = []string{"cri-docker-log.socket", "cri-docker-log.service", "cri-docker.socket", "cri-docker.service"}

// checkInstalled checks an installation: all units are enabled and running, the sockets have the
// right owners, and the version is the package's.
func (m machine) checkInstalled(t *testing.T, version string) {
	t.Helper()
	m.awaitActive(t, all...)
	for _, u := range all {
		if got, _ := m.Try("systemctl", "is-enabled", u); got != "enabled\n" {
			t.Errorf("%s is %q", u, got)
		}
	}

	for file, want := range map[string]string{
		"/run/cri-dockerd.sock": "660 root docker", "/run/docker/plugins/cri-dockerd.sock": "600 root root",
		"/var/lib/cri-dockerd": "700 root root", "/run/cri-dockerd": "711 root root",
	} {
		if got := strings.TrimSpace(m.Run(t, "stat", "-c", "%a %U %G", file)); got != want {
			t.Errorf("%s: %s, want %s", file, got, want)
		}
	}

	if got := m.Run(t, "cri-dockerd", "--version"); !strings.HasPrefix(got, "cri-dockerd "+version+" (") {
		t.Errorf("--version: %s", got)
	}

	r, err := m.cri.Runtime.Version(m.context(t), &runtimeapi.VersionRequest{})
	if err != nil || r.RuntimeName != "docker" {
		t.Errorf("Version: %v, %v", r, err)
	}
}

// context returns a context for one call. It allows for restarts of the daemon.
func (m machine) context(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	t.Cleanup(cancel)
	return ctx
}

// pod is a running container printing numbered lines.
type pod struct {
	machine
	sandbox, container string
	log                string // path of its log outside the node
	process            string // PID in the node and start time
}

func (m machine) pod(t *testing.T) *pod {
	t.Helper()
	engines.LoadBusybox(t, m.Path("/run/docker.sock"))
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{
			Name:      "counter",
			Namespace: "default",
			Uid:       "counter",
		}, LogDirectory: "/var/log/pods/counter",
	}

	s, err := m.cri.Runtime.RunPodSandbox(m.context(t), &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		t.Fatalf("RunPodSandbox: %v", err)
	}

	c, err := m.cri.Runtime.CreateContainer(m.context(t), &runtimeapi.CreateContainerRequest{
		PodSandboxId:  s.PodSandboxId,
		SandboxConfig: cfg,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "counter"},
			Image:    &runtimeapi.ImageSpec{Image: engines.Busybox},
			LogPath:  "counter.log",
			Command: []string{"sh", "-c",
				"trap 'exit 0' TERM; i=0; while :; do echo $i; i=$((i+1)); usleep 5000; done"},
		},
	})
	if err != nil {
		t.Fatalf("CreateContainer: %v", err)
	}

	if _, err := m.cri.Runtime.StartContainer(m.context(t),
		&runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		t.Fatalf("StartContainer: %v", err)
	}

	p := &pod{
		machine:   m,
		sandbox:   s.PodSandboxId,
		container: c.ContainerId,
		log:       m.Path("/var/log/pods/counter/counter.log"),
	}

	p.process = p.currentProcess(t)

	return p
}

// currentProcess returns the container's PID and its start time in ticks (proc_pid_stat(5)).
func (p *pod) currentProcess(t *testing.T) string {
	t.Helper()
	pid := strings.TrimSpace(p.Run(t, "docker", "inspect", "-f", "{{.State.Pid}}", p.container))
	f := strings.Fields(p.Run(t, "cat", "/proc/"+pid+"/stat"))
	return pid + " since " + f[21]
}

// lines returns the number of lines in the log.
func (p *pod) lines(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(p.log)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Count(string(b), "\n")
}

// checkUndisturbed checks after a step that the container has the same process and a growing log.
func (p *pod) checkUndisturbed(t *testing.T, step string) {
	t.Helper()
	if now := p.currentProcess(t); now != p.process {
		t.Errorf("%s: the container's process was %s and is %s", step, p.process, now)
	}
	before := p.lines(t)
	p.Await(t, timeout, step+": the log grows", func() bool { return p.lines(t) > before })
}

// checkRunning checks that the daemon reports pod and container as running.
func (p *pod) checkRunning(t *testing.T, step string) {
	t.Helper()
	s, err := p.cri.Runtime.PodSandboxStatus(p.context(t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
	if err != nil || s.Status.State != runtimeapi.PodSandboxState_SANDBOX_READY || s.Status.Network.GetIp() == "" {
		t.Errorf("%s: the pod is %v, %v", step, s.GetStatus(), err)
	}

	c, err := p.cri.Runtime.ContainerStatus(p.context(t), &runtimeapi.ContainerStatusRequest{ContainerId: p.container})
	if err != nil || c.Status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%s: the container is %v, %v", step, c.GetStatus(), err)
	}
}

var numbered = regexp.MustCompile(`^\S+ stdout F (\d+)$`)

// remove stops and removes the pod. Its log must have every line once.
func (p *pod) remove(t *testing.T) {
	t.Helper()
	if _, err := p.cri.Runtime.StopContainer(p.context(t),
		&runtimeapi.StopContainerRequest{ContainerId: p.container, Timeout: 60}); err != nil {
		t.Errorf("StopContainer: %v", err)
	}

	b, err := os.ReadFile(p.log)
	if err != nil {
		t.Fatal(err)
	}

	n := 0
	for line := range strings.Lines(string(b)) {
		if m := numbered.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m == nil || m[1] != fmt.Sprint(n) {
			t.Fatalf("line %d of the log: %q", n, line)
		}
		n++
	}

	t.Logf("%d lines, none lost or duplicated", n)
	if _, err := p.cri.Runtime.StopPodSandbox(p.context(t),
		&runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Errorf("StopPodSandbox: %v", err)
	}

	if _, err := p.cri.Runtime.RemovePodSandbox(p.context(t),
		&runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Errorf("RemovePodSandbox: %v", err)
	}
}

// checkAbsent checks that files do not exist on the node.
func (m machine) checkAbsent(t *testing.T, step string, files ...string) {
	t.Helper()
	for _, f := range files {
		inside, err := os.ReadDir(m.Path(f)) // nodes have mounts in some places
		if !os.IsNotExist(err) && (err != nil || len(inside) > 0) {
			t.Errorf("%s: %s exists (%v)", step, f, err)
		}
	}
}

// TestNodeLifecycle runs a new node through installation, upgrade, reload, restart, kill, removal,
// installation and purge. A running pod must not be disturbed.
func TestNodeLifecycle(t *testing.T) {
	t.Parallel() // mostly waits for systemd
	m := start(t, first, second)
	m.apt(t, "install", "/tmp/"+first+".deb")
	m.checkInstalled(t, first)
	m.awaitStatus(t, "CNI") // the only missing part
	if failed := m.check(t); len(failed) != 1 || !strings.HasPrefix(failed[0], "cni-config: ") {
		t.Errorf("check without CNI: %q", failed)
	}

	m.WriteFile(t, "/etc/cni/net.d/10-test.conflist", network, 0o644)
	m.awaitStatus(t, "Ready, Docker 20.10")
	if failed := m.check(t); len(failed) > 0 {
		t.Errorf("check with CNI: %q", failed)
	}

	m.checkUnits(t)
	m.checkSocketActivation(t)

	p := m.pod(t)
	writer := m.property(t, "cri-docker-log.service", "MainPID")
	for _, step := range []struct {
		name  string
		do    func()
		renew bool // the daemon's PID changes
	}{
		{"upgrade", func() { m.apt(t, "install", "/tmp/"+second+".deb"); m.checkInstalled(t, second) }, true},
		{"reload", func() { m.Run(t, "systemctl", "reload", "cri-docker.service") }, false},
		{"SIGHUP", func() { m.Run(t, "systemctl", "kill", "-s", "HUP", "cri-docker.service") }, false},
		{"restart", func() { m.Run(t, "systemctl", "restart", "cri-docker.service") }, true},
		{"kill -9", func() {
			m.Run(t, "systemctl", "kill", "-s", "KILL", "--kill-who=main", "cri-docker.service")
		}, true},
		{"downgrade", func() {
			m.apt(t, "install", "--allow-downgrades", "/tmp/"+first+".deb")
			m.checkInstalled(t, first)
		}, true},
	} {
		before := m.property(t, "cri-docker.service", "MainPID")
		step.do()
		p.checkUndisturbed(t, step.name)
		p.checkRunning(t, step.name)
		if after := m.property(t, "cri-docker.service", "MainPID"); (after != before) != step.renew {
			t.Errorf("%s: the daemon's PID was %s and is %s", step.name, before, after)
		}
	}

	if now := m.property(t, "cri-docker-log.service", "MainPID"); now != writer {
		t.Errorf("the log-driver's PID was %s and is %s", writer, now)
	}

	m.removeAndInstall(t, p)
	p.remove(t)

	m.apt(t, "purge", "cri-dockerd")
	m.checkAbsent(t, "purge",
		"/usr/bin/cri-dockerd",
		"/etc/default/cri-docker",
		"/var/lib/cri-dockerd",
		"/run/cri-dockerd",
		"/run/cri-dockerd.sock",
		"/run/docker/plugins/cri-dockerd.sock",
		"/etc/systemd/system/multi-user.target.wants/cri-docker.service",
		"/etc/systemd/system/cri-docker.service")

	if out, _ := m.Try("systemctl", "list-units", "--all", "--plain", "--no-legend", "cri-docker*"); out != "" {
		t.Errorf("after purge: %s", out)
	}

	m.installFromRelease(t)
	m.installFromRepository(t)
}

// removeAndInstall removes, installs and purges the package while the pod runs.
func (m machine) removeAndInstall(t *testing.T, p *pod) {
	t.Helper()
	out := m.apt(t, "remove", "cri-dockerd")
	if !strings.Contains(out, "keep running until the pods end") || !strings.Contains(out, "docker rm -f") {
		t.Errorf("remove does not report the remaining resources: %s", out)
	}

	m.checkAbsent(t, "remove", "/usr/bin/cri-dockerd", "/run/cri-dockerd.sock")
	p.checkUndisturbed(t, "remove")
	m.Run(t, "test", "-e", "/etc/default/cri-docker")
	m.apt(t, "install", "/tmp/"+second+".deb")
	m.checkInstalled(t, second)
	p.checkUndisturbed(t, "install again")
	p.checkRunning(t, "install again")

	out = m.apt(t, "purge", "cri-dockerd")
	if !strings.Contains(out, "kept /run/cri-dockerd") {
		t.Errorf("purge does not report the remaining resources: %s", out)
	}

	m.checkAbsent(t, "purge with a pod", "/usr/bin/cri-dockerd", "/run/cri-dockerd.sock", "/var/lib/cri-dockerd",
		"/etc/default/cri-docker")
	p.checkUndisturbed(t, "purge")
	m.apt(t, "install", "/tmp/"+second+".deb")
	m.checkInstalled(t, second)
	p.checkUndisturbed(t, "install after purge")
	p.checkRunning(t, "install after purge")
}

// check returns the failed findings of cri-dockerd check.
func (m machine) check(t *testing.T) (failed []string) {
	t.Helper()
	out, err := m.Try("cri-dockerd", "check", "-o", "json")
	var report struct {
		Findings []struct{ ID, Status, Detail string }
	}
	if e := json.Unmarshal([]byte(out), &report); e != nil || len(report.Findings) == 0 {
		t.Fatalf("check: %v, %v\n%s", e, err, out)
	}

	for _, f := range report.Findings {
		if f.Status == "fail" {
			failed = append(failed, f.ID+": "+f.Detail)
		}
	}

	if (err != nil) != (len(failed) > 0) {
		t.Errorf("check finds %q and returns %v", failed, err)
	}

	return failed
}

// checkUnits checks the units with systemd-analyze, and the journal for errors.
func (m machine) checkUnits(t *testing.T) {
	t.Helper()
	for _, u := range all {
		out, err := m.Command("systemd-analyze", "verify", "--recursive-errors=no", u).CombinedOutput()
		if err != nil || strings.Contains(string(out), "cri-docker") {
			t.Errorf("systemd-analyze verify %s: %v\n%s", u, err, out)
		}
	}

	if got := m.property(t, "cri-docker.service", "WatchdogTimestampMonotonic"); got == "0" {
		t.Error("the daemon does not notify the watchdog")
	}
	if out := m.Run(t, "journalctl", "-q", "-p", "err", "-u", "cri-docker*"); out != "" {
		t.Errorf("errors in the journal:\n%s", out)
	}
}

// checkSocketActivation checks that the socket outlives the service. The first client starts the
// service.
func (m machine) checkSocketActivation(t *testing.T) {
	t.Helper()
	m.Run(t, "systemctl", "stop", "cri-docker.service")
	m.awaitActive(t, "cri-docker.socket")
	if got := m.property(t, "cri-docker.service", "ActiveState"); got != "inactive" {
		t.Fatalf("after stop: %s", got)
	}
	if _, err := m.cri.Runtime.Version(m.context(t), &runtimeapi.VersionRequest{}); err != nil {
		t.Errorf("the first client: %v", err)
	}

	m.awaitActive(t, "cri-docker.service")
}
