package finding

import (
	"fmt"
	"strconv"
	"strings"

	"cri-dockerd/internal/shell"
)

func daemonRules() []rule {
	return []rule{
		{"one-daemon", "one CRI server on this Docker", nil, judgeOneDaemon},
		{"daemon-flags", "the daemon knows its flags", nil, judgeFlags},
		{"daemon", "the daemon answers", []string{"directories", "docker-group", "one-daemon", "daemon-flags"},
			judgeDaemon},
		{"daemon-socket", "the daemon's socket belongs to root and docker", []string{"daemon"}, judgeSocket},
		{"service-enabled", "the services start at boot", nil, judgeEnabled},
		{"log-driver", "log-driver process", []string{"directories", "engine", "daemon"}, judgeLogDriver},
		{"runtime-ready", "the runtime is ready", []string{"engine", "engine-version", "daemon", "log-driver"},
			judgeRuntime},
		{"container-logs", "container logs are in the CRI's format", []string{"engine", "daemon", "log-driver"},
			judgeContainerLogs},
		{"pod-netns", "pods' network namespaces are the daemon's own", []string{"engine", "daemon"}, judgeNetNS},
		{"streaming", "exec, attach and port-forward can be reached", []string{"daemon"}, judgeStreaming},
	}
}

func judgeOneDaemon(f *Facts) verdict {
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
		return skip("only root can see the processes of others")
	case len(others) > 0 && len(f.Daemon.Others) == 0:
		return fail(kill, "another CRI server for Docker is running: %s; two of them remove each other's pods",
			strings.Join(others, ", "))
	case len(others) > 0:
		return fail(stop, "another CRI server for Docker is running: %s; two of them remove each other's pods",
			strings.Join(others, ", "))
	case ours > 1:
		return fail(kill, "%d daemons are running; two of them remove each other's pods", ours)
	case f.Daemon.LockHolder != 0:
		return fail(shell.Command("kill {}", strconv.Itoa(f.Daemon.LockHolder)),
			"process %d holds the lock on the daemon's root directory and does not serve %s", f.Daemon.LockHolder,
			f.Flags.Endpoint)

	case len(f.Daemon.Others) > 0:
		return warn(stop, "%s is started at boot beside %s; two CRI servers remove each other's pods",
			strings.Join(f.Daemon.Others, ", "), f.daemonUnit())
	}

	return ok("process %s", processes(f.Daemon.Processes))
}

func processes(all []Process) string {
	if len(all) == 0 {
		return "none"
	}
	return strconv.Itoa(all[0].PID)
}

func judgeFlags(f *Facts) verdict {
	m := f.Flags.Mistake
	if m.Error == "" {
		return ok("of %s", f.Flags.Source)
	}

	unit := f.daemonUnit()
	fix := shell.Advice("correct it in the flags of the daemon, then systemctl daemon-reload && systemctl restart {}",
		unit)
	switch {
	case m.File != "" && isFlagName(m.Nearest) && isFlagName(m.Flag):
		fix = shell.Command("sed -i -E {} {} && systemctl daemon-reload && systemctl restart {}",
			"s/--"+m.Flag+"([= ]|$)/--"+m.Nearest+"\\1/", m.File, unit)
	case m.File != "":
		fix = shell.Advice("correct {} in {}, then systemctl daemon-reload && systemctl restart {}", "--"+m.Flag,
			m.File, unit)
	}

	return fail(fix, "the daemon does not start: %s", m.Error)
}

// otherPID is the daemon that is one too many: a foreign one, else the last that is not the one
// that is judged.
func (f *Facts) otherPID() int {
	pid := 0
	for _, p := range f.Daemon.Processes {
		if !p.Ours {
			return p.PID
		}
		if !p.Judged {
			pid = p.PID
		}
	}

	return pid
}

func judgeDaemon(f *Facts) verdict {
	d, at := f.Daemon, f.Flags.Endpoint
	switch d.Problem {
	case "":
		return ok("%s at %s", d.Runtime, at)
	case Missing, Refused:
		return fail(f.startDaemon("start"), "the daemon is not running: nobody listens at %s", at)
	case NoSocket:
		return fail(f.moveSocket(), "%s is no socket", f.Flags.Socket)
	case NotRoot:
		if f.Flags.Socket == "" {
			return fail(shell.Advice("stop the process that listens at {}, then start the daemon", at),
				"%s; it is not believed", d.Error)
		}
		return fail(f.moveSocket(), "%s; it is not believed", d.Error)

	case Denied:
		return fail(shell.Command("sudo usermod -aG docker $(id -un) && newgrp docker"),
			"permission denied at %s: this user is not in the group docker", at)
	case Silent:
		return fail(f.killDaemon(), "the daemon does not answer in time at %s", at)
	}

	return fail(f.killDaemon(), "the daemon at %s: %s", at, d.Error)
}

// moveSocket puts what is in the socket's place out of the way.
func (f *Facts) moveSocket() shell.Line {
	return shell.Command("mv {} {}", f.Flags.Socket, f.Flags.Socket+".moved").And(f.startDaemon("restart"))
}

// killDaemon restarts a daemon that hangs.
func (f *Facts) killDaemon() shell.Line {
	if f.Systemd && f.Daemon.Unit != "" || len(f.Daemon.Processes) == 0 {
		return f.startDaemon("restart")
	}
	return shell.Command("kill -KILL {}; sleep 1", strconv.Itoa(f.Daemon.Processes[0].PID)).
		Then(f.startDaemon("restart"))
}

func judgeSocket(f *Facts) verdict {
	s, path := f.Daemon.Socket, f.Flags.Socket
	if path == "" || !s.Exists {
		return skip("there is none")
	}

	group := "docker"
	if !f.Node.DockerGroup {
		group = "root"
	}

	fix := shell.Command("chown root:{} {} && chmod 0660 {}", group, path, path)
	is := fmt.Sprintf("mode %04o, user %d, group %s", s.Mode, s.Owner, s.Group)
	switch {
	case s.Mode&0o007 != 0:
		return warn(fix, "%s: %s; every user of this machine can become root by it", path, is)
	case s.Mode != 0o660 || s.Owner != 0 || s.Group != group:
		return warn(fix, "%s: %s; it should be 0660 root:%s", path, is, group)
	}

	return ok("%s: 0660 root:%s", path, group)
}

func judgeEnabled(f *Facts) verdict {
	d := f.Daemon
	switch {
	case !f.Systemd:
		return skip("systemd does not run here")
	case d.Unit == "":
		return warn(shell.Advice("install the package of cri-dockerd, or the units of deploy/systemd"),
			"there is no unit of the daemon: after a reboot nobody starts it")
	case !d.Enabled:
		return warn(shell.Command("systemctl enable {}", d.Unit), "%s is not started at boot: the node does not "+
			"come back after a reboot", d.Unit)
	}

	return ok("%s", d.Unit)
}

func judgeLogDriver(f *Facts) verdict {
	l := f.Logs
	switch {
	case f.Flags.ContainerLog == "json-file":
		return skip("not used (--container-log=json-file)")
	case !f.Root:
		return skip("only root may ask")
	case l.Problem == "":
		return ok("process %d at %s", l.PID, l.Socket)
	}

	fix := f.startDaemon("restart")
	switch {
	case f.Systemd && l.Unit:
		fix = shell.Command("systemctl restart cri-docker-log.socket cri-docker-log.service")
	case l.PID != 0:
		fix = shell.Command("kill -KILL {}",
			strconv.Itoa(l.PID)).Note("the daemon starts it again, and no line is lost")
	}

	why := l.Error
	switch l.Problem {
	case Missing:
		why = "its socket is not there"
	case Refused:
		why = "nobody listens"
	case Silent:
		why = "it does not answer in time"
	}

	return fail(fix, "%s: %s; containers cannot start, and those that print wait", l.Socket, why)
}

// condition is one of the daemon's.
func (f *Facts) condition(kind string) (Condition, bool) {
	for _, c := range f.Daemon.Conditions {
		if c.Type == kind {
			return c, true
		}
	}
	return Condition{}, false
}

func judgeRuntime(f *Facts) verdict {
	c, known := f.condition("RuntimeReady")
	switch {
	case !known:
		return skip("not known")
	case !c.Status:
		return fail(f.startDaemon("restart"), "%s: %s", c.Reason, c.Message)
	}

	return ok("RuntimeReady")
}

func judgeContainerLogs(f *Facts) verdict {
	c, known := f.condition("ContainerLogs")
	switch {
	case !known:
		return skip("not known")
	case !c.Status:
		return warn(shell.Advice("correct what the reason names; --container-log=json-file keeps this mode for good "+
			"(docs/logs.md)"),
			"%s: %s", c.Reason, c.Message)
	}

	return ok("%s", c.Reason)
}

func judgeNetNS(f *Facts) verdict {
	c, known := f.condition("PodNetworkNamespaces")
	switch {
	case !known:
		return skip("not known")
	case !c.Status && f.Flags.PauseImage == "" && f.Flags.NetworkPlugin != "":
		return warn(shell.Advice("nothing to do if pods start; --pod-netns=engine keeps this mode for good "+
			"(docs/security.md)"),
			"the engine makes them: %s", c.Message)

	case !c.Status:
		return ok("the engine makes them: %s", c.Message)
	}

	return ok("own")
}

func judgeStreaming(f *Facts) verdict {
	s := f.Daemon.Streaming
	switch {
	case !s.Known:
		return skip("not known")
	case s.Error == "":
		return ok("%s", strings.Join(s.Addresses, ", "))
	case s.LoopbackDown:
		return fail(shell.Command("ip link set lo up"), "the loopback interface is down: %s", s.Error)
	}

	return fail(shell.Advice("leave --streaming-bind-addr away, or let the firewall pass lo: iptables -I INPUT -i "+
		"lo -j ACCEPT"), "%s", s.Error)
}
