package packages

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

const patience = 2 * time.Minute

// machine is a node with what the tests ask it.
type machine struct {
	*nodes.Node
	cri *engines.Daemon
}

// network is a configuration of the standard CNI plugins.
const network = `{"cniVersion": "1.0.0", "name": "test", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true,
	"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`

// start starts a node, without CNI, into which the packages of the versions are copied.
func start(t *testing.T, versions ...string) machine {
	t.Helper()
	n := nodes.Start(t, nodes.Config{})
	n.Run(t, "rm", "-f", "/var/lib/man-db/auto-update") // the index of all manual pages is of no use here
	for _, v := range versions {
		dir := packaged(t, v, runtime.GOARCH)
		n.Copy(t, the(t, dir, "*.deb"), "/tmp/"+v+".deb")
		n.Copy(t, the(t, dir, "*.rpm"), "/tmp/"+v+".rpm")
	}

	return machine{n, engines.Connect(t, "unix://"+n.Path("/run/cri-dockerd.sock"))}
}

// apt installs packages from files, as an operator does, without a question and without a network.
func (m machine) apt(t *testing.T, args ...string) string {
	t.Helper()
	return m.Run(t, "env", append([]string{"DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "-q"}, args...)...)
}

// property is one of a unit's.
func (m machine) property(t *testing.T, unit, name string) string {
	t.Helper()
	return strings.TrimSpace(m.Run(t, "systemctl", "show", "--value", "-p", name, unit))
}

// active waits until a unit's start has ended well.
func (m machine) active(t *testing.T, units ...string) {
	t.Helper()
	for _, u := range units {
		state := ""
		m.Await(t, patience, u+" is active", func() bool {
			state = m.property(t, u, "ActiveState")
			return state == "active" || state == "failed"
		})

		if state != "active" {
			t.Errorf("%s: %s", u, state)
		}
	}
}

// status waits for a line in systemctl status.
func (m machine) status(t *testing.T, want string) {
	t.Helper()
	m.Await(t, patience, "status "+want, func() bool {
		return strings.Contains(m.property(t, "cri-docker.service", "StatusText"), want)
	})
}

var all = []string{"cri-docker-log.socket", "cri-docker-log.service", "cri-docker.socket", "cri-docker.service"}

// installed checks what an installation promises: everything is enabled and runs, the socket is for
// root and the group docker, the version is the package's.
func (m machine) installed(t *testing.T, version string) {
	t.Helper()
	m.active(t, all...)
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

// context is for one call, which waits while the daemon is away.
func (m machine) context(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// pod is a running container that prints numbered lines.
type pod struct {
	machine
	sandbox, container string
	log                string // its log as seen from outside
	process            string // of the container in the node, and when it began
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

	p.process = p.now(t)

	return p
}

// now is the container's process, and the tick at which it began (proc_pid_stat(5)).
func (p *pod) now(t *testing.T) string {
	t.Helper()
	pid := strings.TrimSpace(p.Run(t, "docker", "inspect", "-f", "{{.State.Pid}}", p.container))
	f := strings.Fields(p.Run(t, "cat", "/proc/"+pid+"/stat"))
	return pid + " since " + f[21]
}

// lines are how many the log has.
func (p *pod) lines(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(p.log)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Count(string(b), "\n")
}

// goesOn checks after a step that the container's process is the same, and that its log grows.
func (p *pod) goesOn(t *testing.T, step string) {
	t.Helper()
	if now := p.now(t); now != p.process {
		t.Errorf("%s: the container's process was %s and is %s", step, p.process, now)
	}
	before := p.lines(t)
	p.Await(t, patience, step+": the log grows", func() bool { return p.lines(t) > before })
}

// known checks that the daemon shows pod and container as running.
func (p *pod) known(t *testing.T, step string) {
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

// end stops and removes the pod and checks that its log has every line once.
func (p *pod) end(t *testing.T) {
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

	t.Logf("%d lines, none lost, none twice", n)
	if _, err := p.cri.Runtime.StopPodSandbox(p.context(t),
		&runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Errorf("StopPodSandbox: %v", err)
	}

	if _, err := p.cri.Runtime.RemovePodSandbox(p.context(t),
		&runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Errorf("RemovePodSandbox: %v", err)
	}
}

// gone checks that files of the node are not there.
func (m machine) gone(t *testing.T, step string, files ...string) {
	t.Helper()
	for _, f := range files {
		inside, err := os.ReadDir(m.Path(f)) // nodes have mounts of their own in some places
		if !os.IsNotExist(err) && (err != nil || len(inside) > 0) {
			t.Errorf("%s: %s is there (%v)", step, f, err)
		}
	}
}

// TestLifeOfANode takes a fresh node through installation, upgrade, reload, restart, kill, removal,
// installation and purge, with a pod that notices nothing of it.
func TestLifeOfANode(t *testing.T) {
	t.Parallel() // most of the time systemd waits
	m := start(t, first, second)
	m.apt(t, "install", "/tmp/"+first+".deb")
	m.installed(t, first)
	m.status(t, "CNI") // the one thing that the node lacks
	if failed := m.check(t); len(failed) != 1 || !strings.Contains(failed[0], "cni") {
		t.Errorf("without CNI check finds %q", failed)
	}

	m.WriteFile(t, "/etc/cni/net.d/10-test.conflist", network, 0o644)
	m.status(t, "Ready, Docker 20.10")
	if failed := m.check(t); len(failed) > 0 {
		t.Errorf("with CNI check finds %q", failed)
	}

	m.sane(t)
	m.socketActivates(t)

	p := m.pod(t)
	writer := m.property(t, "cri-docker-log.service", "MainPID")
	for _, step := range []struct {
		name  string
		do    func()
		renew bool // the daemon is another process afterwards
	}{
		{"upgrade", func() { m.apt(t, "install", "/tmp/"+second+".deb"); m.installed(t, second) }, true},
		{"reload", func() { m.Run(t, "systemctl", "reload", "cri-docker.service") }, false},
		{"SIGHUP", func() { m.Run(t, "systemctl", "kill", "-s", "HUP", "cri-docker.service") }, false},
		{"restart", func() { m.Run(t, "systemctl", "restart", "cri-docker.service") }, true},
		{"kill -9", func() {
			m.Run(t, "systemctl", "kill", "-s", "KILL", "--kill-who=main", "cri-docker.service")
		}, true},
		{"downgrade", func() {
			m.apt(t, "install", "--allow-downgrades", "/tmp/"+first+".deb")
			m.installed(t, first)
		}, true},
	} {
		before := m.property(t, "cri-docker.service", "MainPID")
		step.do()
		p.goesOn(t, step.name)
		p.known(t, step.name)
		if after := m.property(t, "cri-docker.service", "MainPID"); (after != before) != step.renew {
			t.Errorf("%s: the daemon was %s and is %s", step.name, before, after)
		}
	}

	if now := m.property(t, "cri-docker-log.service", "MainPID"); now != writer {
		t.Errorf("the process that writes logs was %s and is %s", writer, now)
	}

	m.removals(t, p)
	p.end(t)

	m.apt(t, "purge", "cri-dockerd")
	m.gone(t, "purge", "/usr/bin/cri-dockerd", "/etc/default/cri-docker", "/var/lib/cri-dockerd", "/run/cri-dockerd",
		"/run/cri-dockerd.sock",
		"/run/docker/plugins/cri-dockerd.sock", "/etc/systemd/system/multi-user.target.wants/cri-docker.service",
		"/etc/systemd/system/cri-docker.service")

	if out, _ := m.Try("systemctl", "list-units", "--all", "--plain", "--no-legend", "cri-docker*"); out != "" {
		t.Errorf("after purge: %s", out)
	}
}

// removals removes, installs and purges while the pod runs.
func (m machine) removals(t *testing.T, p *pod) {
	t.Helper()
	out := m.apt(t, "remove", "cri-dockerd")
	if !strings.Contains(out, "running pods go on") || !strings.Contains(out, "docker rm -f") {
		t.Errorf("remove says nothing of what remains: %s", out)
	}

	m.gone(t, "remove", "/usr/bin/cri-dockerd", "/run/cri-dockerd.sock")
	p.goesOn(t, "remove")
	m.Run(t, "test", "-e", "/etc/default/cri-docker")
	m.apt(t, "install", "/tmp/"+second+".deb")
	m.installed(t, second)
	p.goesOn(t, "install again")
	p.known(t, "install again")

	out = m.apt(t, "purge", "cri-dockerd")
	if !strings.Contains(out, "/run/cri-dockerd stays") {
		t.Errorf("purge says nothing of what remains: %s", out)
	}

	m.gone(t, "purge with a pod", "/usr/bin/cri-dockerd", "/run/cri-dockerd.sock", "/var/lib/cri-dockerd",
		"/etc/default/cri-docker")
	p.goesOn(t, "purge")
	m.apt(t, "install", "/tmp/"+second+".deb")
	m.installed(t, second)
	p.goesOn(t, "install after purge")
	p.known(t, "install after purge")
}

// check are the findings of cri-dockerd check that stop the node.
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
		t.Errorf("check finds %q and ends with %v", failed, err)
	}

	return failed
}

// sane lets systemd judge the units, and the journal.
func (m machine) sane(t *testing.T) {
	t.Helper()
	for _, u := range all {
		out, err := m.Command("systemd-analyze", "verify", "--recursive-errors=no", u).CombinedOutput()
		if err != nil || strings.Contains(string(out), "cri-docker") {
			t.Errorf("systemd-analyze verify %s: %v\n%s", u, err, out)
		}
	}

	if got := m.property(t, "cri-docker.service", "WatchdogTimestampMonotonic"); got == "0" {
		t.Error("the watchdog is not fed")
	}
	if out := m.Run(t, "journalctl", "-q", "-p", "err", "-u", "cri-docker*"); out != "" {
		t.Errorf("errors in the journal:\n%s", out)
	}
}

// socketActivates: the socket outlives the service, and its first client starts the service.
func (m machine) socketActivates(t *testing.T) {
	t.Helper()
	m.Run(t, "systemctl", "stop", "cri-docker.service")
	m.active(t, "cri-docker.socket")
	if got := m.property(t, "cri-docker.service", "ActiveState"); got != "inactive" {
		t.Fatalf("after stop: %s", got)
	}
	if _, err := m.cri.Runtime.Version(m.context(t), &runtimeapi.VersionRequest{}); err != nil {
		t.Errorf("the first client: %v", err)
	}

	m.active(t, "cri-docker.service")
}

// olderPackage is one with the older shim's names: its units are enabled, its program does nothing.
func (m machine) olderPackage(t *testing.T) {
	t.Helper()
	for name, content := range map[string]string{
		"DEBIAN/control": "Package: cri-dockerd\nVersion: 0.4.0~3-0~debian-bookworm\n" +
			"Architecture: all\nMaintainer: test <test@example.org>\nDescription: older shim\n",
		"DEBIAN/postinst": "#!/bin/sh\nsystemctl enable cri-docker.socket " +
			"cri-docker.service; systemctl start cri-docker.socket cri-docker.service\n",
		"DEBIAN/prerm":        "#!/bin/sh\nsystemctl stop cri-docker.service\n",
		"usr/bin/cri-dockerd": "#!/bin/sh\nsleep infinity\n",
		"lib/systemd/system/cri-docker.service": "[Unit]\nRequires=cri-docker.socket\n[Service]\n" +
			"ExecStart=/usr/bin/cri-dockerd --container-runtime-endpoint fd://\n[Install]\n" +
			"WantedBy=multi-user.target\n",
		"lib/systemd/system/cri-docker.socket": "[Unit]\nPartOf=cri-docker.service\n[Socket]\n" +
			"ListenStream=%t/cri-dockerd.sock\nSocketMode=0660\nSocketGroup=docker\n[Install]\n" +
			"WantedBy=sockets.target\n",
		"usr/share/doc/cri-dockerd/changelog.text": "older\n",
	} {
		m.WriteFile(t, filepath.Join("/tmp/older", name), content, 0o755)
	}

	m.Run(t, "dpkg-deb", "-b", "/tmp/older", "/tmp/older.deb")
	m.apt(t, "install", "/tmp/older.deb")
	m.active(t, "cri-docker.socket", "cri-docker.service")
}

// Files that installers write: minikube's drop-in with the flags of its pods, kubespray's units of
// another name, which have a socket and name its path all the same.
const (
	minikube = "[Service]\nExecStart=\nExecStart=/usr/bin/cri-dockerd --container-runtime-endpoint fd:// " +
		"--pod-infra-container-image=registry.k8s.io/pause:3.10.1 --network-plugin=cni --hairpin-mode=hairpin-veth"

	kubespraySocket = "[Unit]\nDescription=CRI Docker Socket for the API\nPartOf=cri-dockerd.service\n\n[Socket]\n" +
		"ListenStream=%t/cri-dockerd.sock\nSocketMode=0660\nSocketUser=root\nSocketGroup=docker\n\n[Install]\n" +
		"WantedBy=sockets.target\n"
	kubesprayService = `[Unit]
After=network-online.target firewalld.service docker.service
Wants=network-online.target docker.service
Requires=cri-dockerd.socket

[Service]
Type=notify
ExecStart=/usr/bin/cri-dockerd --container-runtime-endpoint unix:///var/run/cri-dockerd.sock --cni-conf-dir=/etc/cni/net.d --cni-bin-dir=/opt/cni/bin --network-plugin=cni --pod-cidr=10.233.64.0/18,fd85:ee78:d8a6:8607::1:0000/112 --pod-infra-container-image=registry.k8s.io/pause:3.10 --log-level info --ipv6-dual-stack=True

ExecReload=/bin/kill -s HUP $MAINPID
TimeoutSec=0
RestartSec=2
Restart=always
StartLimitBurst=3
StartLimitInterval=60s
LimitNOFILE=infinity
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
Delegate=yes
KillMode=process

[Install]
WantedBy=multi-user.target
`
)

// TestOldNode upgrades a node of the older shim's package, sets what installers set, takes the
// engine away, and changes to the rpm, with a pod that notices nothing of the rpm's life.
func TestOldNode(t *testing.T) {
	t.Parallel() // most of the time systemd waits
	m := start(t, first, second)
	m.olderPackage(t)
	m.WriteFile(t, "/etc/cni/net.d/10-test.conflist", network, 0o644)
	m.apt(t, "install", "/tmp/"+first+".deb")
	m.installed(t, first)
	m.status(t, "Ready, Docker 20.10")
	m.sane(t)
	m.staysDisabled(t)

	m.WriteFile(t, "/etc/systemd/system/cri-docker.service.d/10-cni.conf", minikube, 0o644)
	m.reconfigured(t, "cri-docker", "--hairpin-mode=hairpin-veth")
	m.Await(t, patience, "logs in the CRI's format, though no registry gives the pause image", func() bool {
		s, err := m.cri.Runtime.Status(m.context(t), &runtimeapi.StatusRequest{})
		return err == nil && strings.Contains(s.String(), "CRIFiles")
	})

	m.Run(t, "rm", "-r", "/etc/systemd/system/cri-docker.service.d")
	m.WriteFile(t, "/etc/default/cri-docker", `CRI_DOCKERD_OPTS="--log-level=debug --network-plugin=cni"`+"\n", 0o644)
	m.reconfigured(t, "cri-docker", "--network-plugin=cni")
	m.withoutEngine(t)
	m.watched(t)
	m.apt(t, "purge", "cri-dockerd")
	m.kubespray(t)
	m.rpm(t)
}

// staysDisabled: an upgrade respects what the operator has switched off.
func (m machine) staysDisabled(t *testing.T) {
	t.Helper()
	off := []string{"cri-docker.socket", "cri-docker.service"}
	m.Run(t, "systemctl", append([]string{"disable", "--now"}, off...)...)
	m.apt(t, "install", "/tmp/"+second+".deb")
	for _, u := range off {
		if got, _ := m.Try("systemctl", "is-enabled", u); got != "disabled\n" ||
			m.property(t, u, "ActiveState") != "inactive" {
			t.Errorf("%s was disabled and is %q", u, got)
		}
	}

	m.Run(t, "systemctl", append([]string{"enable", "--now"}, all...)...)
	m.installed(t, second)
}

// reconfigured restarts a service and checks a flag that it must have got.
func (m machine) reconfigured(t *testing.T, name, flag string) {
	t.Helper()
	m.Run(t, "systemctl", "daemon-reload")
	m.Run(t, "systemctl", "restart", name+".service")
	m.active(t, name+".socket", name+".service")
	command := strings.ReplaceAll(m.Run(t, "cat", "/proc/"+m.property(t, name+".service", "MainPID")+"/cmdline"),
		"\x00", " ")
	if !strings.Contains(command, flag+" ") {
		t.Errorf("it runs as %q", command)
	}

	if r, err := m.cri.Runtime.Version(m.context(t), &runtimeapi.VersionRequest{}); err != nil ||
		r.RuntimeName != "docker" {
		t.Errorf("with %s: %v, %v", flag, r, err)
	}
}

// withoutEngine: an engine that is down neither holds up the start nor ends the daemon nor fills
// the journal; when it is back, so is the node.
func (m machine) withoutEngine(t *testing.T) {
	t.Helper()
	m.Run(t, "systemctl", "mask", "--runtime", "docker.service", "docker.socket")
	m.Run(t, "systemctl", "stop", "docker.socket", "docker.service")
	m.status(t, "Docker does not answer")
	m.Run(t, "systemctl", "restart", "cri-docker.service")
	m.active(t, "cri-docker.service")
	m.status(t, "Docker does not answer")
	pid := m.property(t, "cri-docker.service", "MainPID")
	begin := time.Now()
	m.Await(t, patience, "some seconds without the engine", func() bool { return time.Since(begin) > 5*time.Second })
	lines := m.Run(t, "journalctl", "-q", "-o", "cat", "_PID="+pid)
	if n := strings.Count(lines, "level=WARN") + strings.Count(lines, "level=ERROR"); n == 0 || n > 3 {
		t.Errorf("%d complaints in the journal:\n%s", n, lines)
	}

	m.Run(t, "systemctl", "unmask", "--runtime", "docker.service", "docker.socket")
	m.Run(t, "systemctl", "start", "docker.socket", "docker.service")
	m.status(t, "Ready, Docker 20.10")
	if now := m.property(t, "cri-docker.service", "MainPID"); now != pid {
		t.Errorf("the daemon was %s and is %s", pid, now)
	}
}

// watched: a daemon that hangs is ended with its stacks in the journal, and started again.
func (m machine) watched(t *testing.T) {
	t.Helper()
	m.WriteFile(t, "/etc/systemd/system/cri-docker.service.d/watchdog.conf", "[Service]\nWatchdogSec=10s\n", 0o644)
	m.reconfigured(t, "cri-docker", "--network-plugin=cni")
	pid := m.property(t, "cri-docker.service", "MainPID")
	m.Run(t, "kill", "-STOP", pid)
	m.Await(t, patience, "another daemon in the place of the one that hangs", func() bool {
		now := m.property(t, "cri-docker.service", "MainPID")
		return now != "0" && now != pid && m.property(t, "cri-docker.service", "ActiveState") == "active"
	})

	if said := m.Run(t, "journalctl", "-q", "-o", "cat", "_PID="+pid); !strings.Contains(said, "goroutine 1 ") {
		t.Errorf("the one that hung has left no stacks:\n%.500s", said)
	}

	m.Run(t, "rm", "-r", "/etc/systemd/system/cri-docker.service.d")
}

// kubespray runs the program of the tgz in kubespray's units.
func (m machine) kubespray(t *testing.T) {
	t.Helper()
	m.Copy(t, the(t, packaged(t, first, runtime.GOARCH), "*.tgz"), "/tmp/cri-dockerd.tgz")
	m.Run(t, "tar", "-xzf", "/tmp/cri-dockerd.tgz", "-C", "/usr/bin", "--strip-components=1", "cri-dockerd/cri-dockerd")
	m.WriteFile(t, "/etc/systemd/system/cri-dockerd.service", kubesprayService, 0o644)
	m.WriteFile(t, "/etc/systemd/system/cri-dockerd.socket", kubespraySocket, 0o644)
	m.reconfigured(t, "cri-dockerd", "--ipv6-dual-stack=True")
	if out, err := m.Command("systemd-analyze", "verify", "--recursive-errors=no",
		"cri-dockerd.service").CombinedOutput(); err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}

	m.reconfigured(t, "cri-dockerd", "--ipv6-dual-stack=True")
	m.Run(t, "systemctl", "stop", "cri-dockerd.socket", "cri-dockerd.service")
	m.Run(t, "rm", "/etc/systemd/system/cri-dockerd.service", "/etc/systemd/system/cri-dockerd.socket",
		"/usr/bin/cri-dockerd")
	// it outlives the daemon that had started it, and makes room for a package's
	m.Run(t, "pgrep", "-f", "log-driver --run-directory")
	m.Run(t, "systemctl", "daemon-reload")
}

// rpm takes the node through the rpm's life; dependencies are of another distribution.
func (m machine) rpm(t *testing.T) {
	t.Helper()
	m.Run(t, "rpm", "-i", "--nodeps", "/tmp/"+first+".rpm")
	m.installed(t, first)
	p := m.pod(t)
	m.Run(t, "rpm", "-U", "--nodeps", "/tmp/"+second+".rpm")
	m.installed(t, second)
	p.goesOn(t, "rpm -U")
	p.known(t, "rpm -U")
	if out := m.Run(t, "rpm", "-e", "cri-dockerd"); !strings.Contains(out, "running pods go on") {
		t.Errorf("rpm -e says nothing of what remains: %s", out)
	}

	m.gone(t, "rpm -e", "/usr/bin/cri-dockerd", "/run/cri-dockerd.sock",
		"/etc/systemd/system/multi-user.target.wants/cri-docker.service")
	p.goesOn(t, "rpm -e")
	m.Run(t, "rpm", "-i", "--nodeps", "/tmp/"+second+".rpm")
	m.installed(t, second)
	p.goesOn(t, "rpm -i")
	p.known(t, "rpm -i")
	p.end(t)
	m.Run(t, "rpm", "-e", "cri-dockerd")
	if out, _ := m.Try("systemctl", "list-units", "--all", "--plain", "--no-legend", "cri-docker*"); out != "" {
		t.Errorf("after rpm -e: %s", out)
	}
}
