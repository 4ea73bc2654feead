package packages

import (
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// installOlderPackage installs a package with the older shim's names. Its units are enabled, and
// its program does nothing.
func (m machine) installOlderPackage(t *testing.T) {
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
	m.awaitActive(t, "cri-docker.socket", "cri-docker.service")
}

// Files of installers: minikube's drop-in with its flags, and kubespray's units. The latter have
// other names, and use both a socket unit and its path.
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

// TestOldNode upgrades a node from the older shim's package, applies settings of installers, stops
// the engine, and replaces the package by the rpm. A pod must not be disturbed by the rpm's
// lifecycle.
func TestOldNode(t *testing.T) {
	t.Parallel() // mostly waits for systemd
	m := start(t, first, second)
	m.installOlderPackage(t)
	m.WriteFile(t, "/etc/cni/net.d/10-test.conflist", network, 0o644)
	m.apt(t, "install", "/tmp/"+first+".deb")
	m.checkInstalled(t, first)
	m.awaitStatus(t, "Ready, Docker 20.10")
	m.checkUnits(t)
	m.checkStaysDisabled(t)

	m.WriteFile(t, "/etc/systemd/system/cri-docker.service.d/10-cni.conf", minikube, 0o644)
	m.restartWithFlag(t, "cri-docker", "--hairpin-mode=hairpin-veth")
	m.Await(t, timeout, "logs in the CRI format, although no registry has the pause image", func() bool {
		s, err := m.cri.Runtime.Status(m.context(t), &runtimeapi.StatusRequest{})
		return err == nil && strings.Contains(s.String(), "CRIFiles")
	})

	m.Run(t, "rm", "-r", "/etc/systemd/system/cri-docker.service.d")
	m.WriteFile(t, "/etc/default/cri-docker", `CRI_DOCKERD_OPTS="--log-level=debug --network-plugin=cni"`+"\n", 0o644)
	m.restartWithFlag(t, "cri-docker", "--network-plugin=cni")
	m.checkWithoutEngine(t)
	m.checkWatchdog(t)
	m.apt(t, "purge", "cri-dockerd")
	m.kubespray(t)
	m.rpm(t)
}

// checkStaysDisabled upgrades the package. Units disabled by the operator must stay disabled.
func (m machine) checkStaysDisabled(t *testing.T) {
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
	m.checkInstalled(t, second)
}

// restartWithFlag restarts a service and checks for a flag on its command line.
func (m machine) restartWithFlag(t *testing.T, name, flag string) {
	t.Helper()
	m.Run(t, "systemctl", "daemon-reload")
	m.Run(t, "systemctl", "restart", name+".service")
	m.awaitActive(t, name+".socket", name+".service")
	command := strings.ReplaceAll(m.Run(t, "cat", "/proc/"+m.property(t, name+".service", "MainPID")+"/cmdline"),
		"\x00", " ")
	if !strings.Contains(command, flag+" ") {
		t.Errorf("the command line is %q", command)
	}

	if r, err := m.cri.Runtime.Version(m.context(t), &runtimeapi.VersionRequest{}); err != nil ||
		r.RuntimeName != "docker" {
		t.Errorf("with %s: %v, %v", flag, r, err)
	}
}

// checkWithoutEngine verifies that a stopped engine neither delays the start, ends the daemon nor
// floods the journal. The node recovers with the engine.
func (m machine) checkWithoutEngine(t *testing.T) {
	t.Helper()
	m.Run(t, "systemctl", "mask", "--runtime", "docker.service", "docker.socket")
	m.Run(t, "systemctl", "stop", "docker.socket", "docker.service")
	m.awaitStatus(t, "Docker does not answer")
	m.Run(t, "systemctl", "restart", "cri-docker.service")
	m.awaitActive(t, "cri-docker.service")
	m.awaitStatus(t, "Docker does not answer")
	pid := m.property(t, "cri-docker.service", "MainPID")
	begin := time.Now()
	m.Await(t, timeout, "5 s without the engine", func() bool { return time.Since(begin) > 5*time.Second })
	lines := m.Run(t, "journalctl", "-q", "-o", "cat", "_PID="+pid)
	if n := strings.Count(lines, "level=WARN") + strings.Count(lines, "level=ERROR"); n == 0 || n > 3 {
		t.Errorf("%d warnings and errors in the journal:\n%s", n, lines)
	}

	m.Run(t, "systemctl", "unmask", "--runtime", "docker.service", "docker.socket")
	m.Run(t, "systemctl", "start", "docker.socket", "docker.service")
	m.awaitStatus(t, "Ready, Docker 20.10")
	if now := m.property(t, "cri-docker.service", "MainPID"); now != pid {
		t.Errorf("the daemon's PID was %s and is %s", pid, now)
	}
}

// checkWatchdog checks that systemd's watchdog ends a hanging daemon, with its stacks in the
// journal, and restarts it.
func (m machine) checkWatchdog(t *testing.T) {
	t.Helper()
	m.WriteFile(t, "/etc/systemd/system/cri-docker.service.d/watchdog.conf", "[Service]\nWatchdogSec=10s\n", 0o644)
	m.restartWithFlag(t, "cri-docker", "--network-plugin=cni")
	pid := m.property(t, "cri-docker.service", "MainPID")
	m.Run(t, "kill", "-STOP", pid)
	m.Await(t, timeout, "a new daemon replaces the hanging one", func() bool {
		now := m.property(t, "cri-docker.service", "MainPID")
		return now != "0" && now != pid && m.property(t, "cri-docker.service", "ActiveState") == "active"
	})

	if log := m.Run(t, "journalctl", "-q", "-o", "cat", "_PID="+pid); !strings.Contains(log, "goroutine 1 ") {
		t.Errorf("no stacks of the hanging daemon in the journal:\n%.500s", log)
	}

	m.Run(t, "rm", "-r", "/etc/systemd/system/cri-docker.service.d")
}

// kubespray runs the program of the tgz in kubespray's units.
func (m machine) kubespray(t *testing.T) {
	t.Helper()
	m.Copy(t, onlyFile(t, packaged(t, first, runtime.GOARCH), "*."+runtime.GOARCH+".tgz"),
		"/tmp/cri-dockerd.tgz")
	m.Run(t, "tar", "-xzf", "/tmp/cri-dockerd.tgz", "-C", "/usr/bin", "--strip-components=1", "cri-dockerd/cri-dockerd")
	m.WriteFile(t, "/etc/systemd/system/cri-dockerd.service", kubesprayService, 0o644)
	m.WriteFile(t, "/etc/systemd/system/cri-dockerd.socket", kubespraySocket, 0o644)
	m.restartWithFlag(t, "cri-dockerd", "--ipv6-dual-stack=True")
	if out, err := m.Command("systemd-analyze", "verify", "--recursive-errors=no",
		"cri-dockerd.service").CombinedOutput(); err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}

	m.restartWithFlag(t, "cri-dockerd", "--ipv6-dual-stack=True")
	m.Run(t, "systemctl", "stop", "cri-dockerd.socket", "cri-dockerd.service")
	m.Run(t, "rm", "/etc/systemd/system/cri-dockerd.service", "/etc/systemd/system/cri-dockerd.socket",
		"/usr/bin/cri-dockerd")
	// The log-driver outlives its daemon and yields to that of a package.
	m.Run(t, "pgrep", "-f", "log-driver --run-directory")
	m.Run(t, "systemctl", "daemon-reload")
}

// rpm runs the node through the rpm's lifecycle. Its dependencies belong to another distribution.
func (m machine) rpm(t *testing.T) {
	t.Helper()
	m.Run(t, "rpm", "-i", "--nodeps", "/tmp/"+first+".rpm")
	m.checkInstalled(t, first)
	p := m.pod(t)
	m.Run(t, "rpm", "-U", "--nodeps", "/tmp/"+second+".rpm")
	m.checkInstalled(t, second)
	p.checkUndisturbed(t, "rpm -U")
	p.checkRunning(t, "rpm -U")
	if out := m.Run(t, "rpm", "-e", "cri-dockerd"); !strings.Contains(out, "keep running until the pods end") {
		t.Errorf("rpm -e does not report the remaining resources: %s", out)
	}

	m.checkAbsent(t, "rpm -e", "/usr/bin/cri-dockerd", "/run/cri-dockerd.sock",
		"/etc/systemd/system/multi-user.target.wants/cri-docker.service")
	p.checkUndisturbed(t, "rpm -e")
	m.Run(t, "rpm", "-i", "--nodeps", "/tmp/"+second+".rpm")
	m.checkInstalled(t, second)
	p.checkUndisturbed(t, "rpm -i")
	p.checkRunning(t, "rpm -i")
	p.remove(t)
	m.Run(t, "rpm", "-e", "cri-dockerd")
	if out, _ := m.Try("systemctl", "list-units", "--all", "--plain", "--no-legend", "cri-docker*"); out != "" {
		t.Errorf("after rpm -e: %s", out)
	}
}
