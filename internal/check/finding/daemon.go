package finding

import (
	"fmt"
	"strconv"
	"strings"

	"cri-dockerd/internal/shell"
)

func daemonRules() []rule {
	return []rule{
		{"one-daemon", "only one CRI server uses Docker", nil, checkOneDaemon},
		{"daemon-flags", "daemon flags are valid", nil, checkFlags},
		{"nri-files", "files of NRI plugins are valid", nil, checkNRIFiles},
		{
			"daemon", "the daemon responds",
			[]string{"directories", "docker-group", "one-daemon", "daemon-flags", "nri-files"}, checkDaemon,
		},
		{"daemon-socket", "permissions of the daemon socket", []string{"daemon"}, checkSocket},
		{"service-enabled", "services start at boot", nil, checkEnabled},
		{"log-driver", "log-driver process", []string{"directories", "engine", "daemon"}, checkLogDriver},
		{
			"runtime-ready", "the container runtime is ready",
			[]string{"engine", "engine-version", "daemon", "log-driver"}, checkRuntime,
		},
		{
			"container-logs", "container logs have the CRI format",
			[]string{"engine", "daemon", "log-driver"}, checkContainerLogs,
		},
		{"pod-netns", "the daemon creates the network namespaces of pods", []string{"engine", "daemon"}, checkNetNS},
		{"containerd-shim", "pods run under the containerd shim if requested", []string{"engine", "daemon"}, checkShim},
		{"nri-plugins", "NRI plugins are connected", []string{"engine", "daemon"}, checkNRIPlugins},
		{"streaming", "the streaming server is reachable", []string{"daemon"}, checkStreaming},
	}
}

func checkOneDaemon(f *Facts) result {
	var others []string
	ours := 0
	for _, p := range f.Daemon.Processes {
		if p.Ours {
			ours++
		} else {
			others = append(others, fmt.Sprintf("%s (process %d)", p.Program, p.PID))
		}
	}

	stop := shell.Command("systemctl disable --now").Args(f.Daemon.Others...)
	kill := shell.Command("kill {}", strconv.Itoa(f.otherPID()))
	switch {
	case !f.Root:
		return skip("requires root to list processes of other users")
	case len(others) > 0 && len(f.Daemon.Others) == 0:
		return fail(kill, "another CRI server for Docker is running: %s; two CRI servers remove each other's pods",
			strings.Join(others, ", "))
	case len(others) > 0:
		return fail(stop, "another CRI server for Docker is running: %s; two CRI servers remove each other's pods",
			strings.Join(others, ", "))
	case ours > 1:
		return fail(kill, "%d instances of cri-dockerd are running; they remove each other's pods", ours)
	case f.Daemon.LockHolder != 0:
		return fail(shell.Command("kill {}", strconv.Itoa(f.Daemon.LockHolder)),
			"process %d holds the lock on the daemon's root directory but does not serve %s", f.Daemon.LockHolder,
			f.Flags.Endpoint)

	case len(f.Daemon.Others) > 0:
		return warn(stop, "%s and %s both start at boot; two CRI servers remove each other's pods",
			strings.Join(f.Daemon.Others, ", "), f.daemonUnit())
	}

	if len(f.Daemon.Processes) == 0 {
		return ok("no CRI server for Docker is running")
	}

	return ok("process %d", f.Daemon.Processes[0].PID)
}

func checkFlags(f *Facts) result {
	m := f.Flags.Mistake
	if m.Error == "" {
		return ok("from %s", f.Flags.Source)
	}

	unit := f.daemonUnit()
	fix := shell.Advice("correct the flags of the daemon, then systemctl daemon-reload && systemctl restart {}",
		unit)
	switch {
	case m.File != "" && isFlagName(m.Nearest) && isFlagName(m.Flag):
		fix = shell.Command("sed -i -E {} {} && systemctl daemon-reload && systemctl restart {}",
			"s/--"+m.Flag+"([= ]|$)/--"+m.Nearest+"\\1/", m.File, unit)
	case m.File != "":
		fix = shell.Advice("correct {} in {}, then systemctl daemon-reload && systemctl restart {}", "--"+m.Flag,
			m.File, unit)
	}

	return fail(fix, "the daemon cannot start: %s", m.Error)
}

// otherPID returns the process ID of the surplus daemon: another program, otherwise the last daemon
// except the checked one.
func (f *Facts) otherPID() int {
	pid := 0
	for _, p := range f.Daemon.Processes {
		if !p.Ours {
			return p.PID
		}
		if !p.Checked {
			pid = p.PID
		}
	}

	return pid
}

func checkDaemon(f *Facts) result {
	d, at := f.Daemon, f.Flags.Endpoint
	switch d.Problem {
	case "":
		if d.Slow > 0 {
			return f.slow("the daemon at "+at, d.Slow)
		}
		return ok("%s at %s", d.Runtime, at)
	case Missing, Refused:
		return fail(f.startDaemon("start"), "the daemon is not running: nothing listens on %s", at)
	case NoSocket:
		return fail(f.moveSocket(), "%s is not a socket", f.Flags.Socket)
	case NotRoot:
		if f.Flags.Socket == "" {
			return fail(shell.Advice("stop the process listening on {}, then start the daemon", at),
				"the daemon's address is not trusted: %s", d.Error)
		}
		return fail(f.moveSocket(), "the daemon's socket is not trusted: %s", d.Error)

	case Denied:
		return fail(shell.Command("sudo usermod -aG docker $(id -un) && newgrp docker"),
			"permission denied on %s: the user is not a member of the group docker", at)
	case Silent:
		return f.silent("the daemon at "+at, d.Slow, d.Stopped, f.killDaemon())
	}

	return fail(f.killDaemon(), "the daemon at %s: %s", at, d.Error)
}

// moveSocket returns the line to move a file aside from the path of the socket.
func (f *Facts) moveSocket() shell.Line {
	return shell.Command("mv {} {}", f.Flags.Socket, f.Flags.Socket+".moved").And(f.startDaemon("restart"))
}

// killDaemon returns the line to restart a hanging daemon.
func (f *Facts) killDaemon() shell.Line {
	if f.Systemd && f.Daemon.Unit != "" || len(f.Daemon.Processes) == 0 {
		return f.startDaemon("restart")
	}
	return shell.Command("kill -KILL {}; sleep 1", strconv.Itoa(f.Daemon.Processes[0].PID)).
		Then(f.startDaemon("restart"))
}

func checkSocket(f *Facts) result {
	s, path := f.Daemon.Socket, f.Flags.Socket
	if path == "" || !s.Exists {
		return skip("no socket")
	}

	group := "docker"
	if !f.Node.DockerGroup {
		group = "root"
	}

	fix := shell.Command("chown root:{} {} && chmod 0660 {}", group, path, path)
	current := fmt.Sprintf("mode %04o, user %d, group %s", s.Mode, s.Owner, s.Group)
	switch {
	case s.Mode&0o007 != 0:
		return warn(fix, "%s: %s; every user of this node can become root through it", path, current)
	case s.Mode != 0o660 || s.Owner != 0 || s.Group != group:
		return warn(fix, "%s: %s; want mode 0660, user 0, group %s", path, current, group)
	}

	return ok("%s: 0660 root:%s", path, group)
}

func checkEnabled(f *Facts) result {
	d := f.Daemon
	switch {
	case !f.Systemd:
		return skip("systemd is not running")
	case d.Unit == "":
		return warn(shell.Advice("install the package of cri-dockerd, or the units from deploy/systemd"),
			"the daemon has no systemd unit: it does not start after a reboot")
	case !d.Enabled:
		return warn(shell.Command("systemctl enable {}", d.Unit),
			"%s is not enabled: the node does not become Ready after a reboot", d.Unit)
	}

	return ok("%s", d.Unit)
}

func checkLogDriver(f *Facts) result {
	l := f.Logs
	switch {
	case f.Flags.ContainerLog == "json-file":
		return skip("not used (--container-log=json-file)")
	case !f.Root:
		return skip("requires root")
	case l.Problem == "" && l.Slow > 0:
		return f.slow("the log-driver process at "+l.Socket, l.Slow)
	case l.Problem == "":
		return ok("process %d at %s", l.PID, l.Socket)
	}

	fix := f.startDaemon("restart")
	switch {
	case f.Systemd && l.Unit:
		fix = shell.Command("systemctl restart cri-docker-log.socket cri-docker-log.service")
	case l.PID != 0:
		fix = shell.Command("kill -KILL {}", strconv.Itoa(l.PID)).
			Note("the daemon restarts it, and no log lines are lost")
	}

	why := l.Error
	switch l.Problem {
	case Missing:
		why = "the socket does not exist"
	case Refused:
		why = "nothing listens on the socket"
	case Silent:
		return f.silent("the log-driver process at "+l.Socket, l.Slow, l.Stopped, fix)
	}

	return fail(fix, "log-driver process at %s: %s; containers cannot start, and running containers block when they "+
		"write logs", l.Socket, why)
}

// condition returns a condition of the daemon's status.
func (f *Facts) condition(kind string) (Condition, bool) {
	for _, c := range f.Daemon.Conditions {
		if c.Type == kind {
			return c, true
		}
	}
	return Condition{}, false
}

func checkRuntime(f *Facts) result {
	c, known := f.condition("RuntimeReady")
	switch {
	case !known:
		return skip("unknown")
	case !c.Status && f.Engine.Slow > 0:
		return fail(findLoad(), "%s: %s", c.Reason, c.Message)
	case !c.Status:
		return fail(f.startDaemon("restart"), "%s: %s", c.Reason, c.Message)
	}

	return ok("condition RuntimeReady is true")
}

func checkContainerLogs(f *Facts) result {
	c, known := f.condition("ContainerLogs")
	switch {
	case !known:
		return skip("unknown")
	case !c.Status:
		return warn(shell.Advice("resolve the reason; to keep json-file logs, set --container-log=json-file "+
			"(docs/logs.md)"), "%s: %s", c.Reason, c.Message)
	}

	return ok("%s", c.Reason)
}

func checkNetNS(f *Facts) result {
	c, known := f.condition("PodNetworkNamespaces")
	switch {
	case !known:
		return skip("unknown")
	case !c.Status && f.Flags.PauseImage == "" && f.Flags.NetworkPlugin != "":
		return warn(shell.Advice("no action is required if pods start; to keep this mode, set --pod-netns=engine "+
			"(docs/security.md)"),
			"Docker creates the network namespaces of pods: %s", c.Message)

	case !c.Status:
		return ok("Docker creates the network namespaces of pods: %s", c.Message)
	}

	return ok("created by the daemon")
}

// checkShim checks --containers. The daemon reports the condition only if the shim is wanted.
func checkShim(f *Facts) result {
	c, known := f.condition("ContainerdShim")
	switch {
	case !known:
		return ok("not requested (--containers=engine)")
	case c.Status:
		return ok("new pods run under the shim")
	case c.Reason == "Pending":
		return skip("%s", c.Message)
	case f.Flags.Containers != "shim" && c.Reason == "NotSupported":
		return ok("new pods run under Docker's default runtime: %s", c.Message)
	case f.Flags.Containers == "shim":
		return fail(shell.Advice("resolve the reason, or set --containers=auto (docs/flags.md#docker)"),
			"no new pod can run: %s", c.Message)
	}

	return warn(shell.Advice("resolve the reason; to run pods without the shim, set --containers=engine "+
		"(docs/flags.md#docker)"), "new pods run under Docker's default runtime: %s", c.Message)
}

func checkStreaming(f *Facts) result {
	s := f.Daemon.Streaming
	switch {
	case !s.Known:
		return skip("unknown")
	case s.Error == "":
		return ok("%s", strings.Join(s.Addresses, ", "))
	case s.LoopbackDown:
		return fail(shell.Command("ip link set lo up"), "the loopback interface is down: %s", s.Error)
	}

	return fail(shell.Advice("remove --streaming-bind-addr, or allow traffic on lo: iptables -I INPUT -i lo -j ACCEPT"),
		"the streaming server is not reachable: %s", s.Error)
}
