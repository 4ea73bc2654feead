package finding

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"cri-dockerd/internal/shell"
)

// restarted returns a line after which the kubelet is restarted; without systemd, a note asks the
// reader to do so.
func (f *Facts) restarted(line shell.Line) shell.Line {
	if f.Systemd {
		return line.And(shell.Command("systemctl restart kubelet"))
	}
	return line.Note("then restart kubelet")
}

// isFlagName reports whether a name may stand in an expression of sed.
func isFlagName(s string) bool {
	return s != "" && s[0] != '-' && len(s) < 100 && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-')
	})
}

// startEngine is the line that starts Docker.
func (f *Facts) startEngine(verb string) shell.Line {
	switch {
	case !f.Engine.Installed:
		if f.Debian {
			return shell.Command("apt-get update && apt-get install -y docker.io")
		}
		return shell.Advice("install Docker Engine: https://docs.docker.com/engine/install/")

	case f.Systemd:
		return shell.Command("systemctl {} docker", verb)
	case f.Engine.SysV:
		return shell.Command("service docker {}", verb)
	}

	return shell.Command("dockerd").Detached("/var/log/docker.log")
}

// daemonUnit is the daemon's service.
func (f *Facts) daemonUnit() string {
	if f.Daemon.Unit == "" {
		return "cri-docker"
	}
	return f.Daemon.Unit
}

// startDaemon is the line that starts the daemon, or starts it anew.
func (f *Facts) startDaemon(verb string) shell.Line {
	if f.Systemd && f.Daemon.Unit != "" {
		return shell.Command("systemctl {} {}", verb, f.Daemon.Unit)
	}
	return f.Flags.Command.Detached("/var/log/cri-dockerd.log")
}

// setDaemonJSON is the line that sets a key at the top of Docker's daemon.json, and what makes the
// engine read it.
func (f *Facts) setDaemonJSON(key, value, then string) shell.Line {
	c := f.Engine.Config
	if c.Error != "" { // what the file has is not known
		return shell.Advice("set {} to {} in {}", key, value, c.File)
	}

	set := fmt.Sprintf(`"%s": %s`, key, value)
	var line shell.Line
	switch _, there := c.Keys[key]; {
	case len(c.Keys) == 0:
		line = shell.Command("mkdir -p {} && echo {} > {}", dirOf(c.File), "{"+set+"}", c.File)
	// a word or number; a list or object is not replaced so simply, and none is set here
	case there:
		line = shell.Command("sed -i -E {} {}", fmt.Sprintf(`s/"%s": *[^,} ]+/%s/`, key, set), c.File)
	default:
		line = shell.Command("sed -i {} {}", "0,/{/s/{/{"+set+", /", c.File)
	}

	switch {
	case f.Systemd:
		return line.And(shell.Command("systemctl {} docker", then))
	case f.Engine.PID != 0:
		return line.And(shell.Command("kill -HUP {}", strconv.Itoa(f.Engine.PID)))
	}

	return line.Note("then restart Docker")
}

func dirOf(file string) string { return file[:max(strings.LastIndexByte(file, '/'), 0)] }

// setKubelet is the line that sets a key of the kubelet's configuration and, if it is given by a
// flag, takes away that.
func (f *Facts) setKubelet(key, value, flag string) shell.Line {
	if !shell.IsPlain(value) {
		return shell.Advice("set {} in the configuration of the kubelet to {}", key, value)
	}

	var fix shell.Line
	if files := f.filesWith(flag); len(files) > 0 {
		fix = dropFlags(files, flag)
	}

	if file := f.Kubelet.ConfigFile; file == "" {
		fix = fix.And(addKubeletFlag(extraArgs, "--"+flag+"="+value))
	} else {
		fix = fix.And(shell.Command("sed -i -e {} -e {} {} && echo {} >> {}", "/^"+key+":/d", `$a\`, file, key+": "+
			value, file))
	}

	return f.restarted(fix.And(f.reloadUnits(flag)))
}

// extraArgs is the file of flags that the kubelet's packages leave to the operator.
const extraArgs = "/etc/default/kubelet"

// addKubeletFlag is the line that adds a plain flag to those of the operator; the last assignment
// in the file is the one that holds.
func addKubeletFlag(file, flag string) shell.Line {
	change := `s#^KUBELET_EXTRA_ARGS="?([^"]*)"?$#KUBELET_EXTRA_ARGS="\1 ` + flag + `"#`
	add := `KUBELET_EXTRA_ARGS="` + flag + `"`
	return shell.Command("{ grep -qs ^KUBELET_EXTRA_ARGS= {} && sed -i -E {} {} || echo {} >> {}; }",
		file, change, file, add, file)
}

// reloadUnits makes systemd read units anew in which a flag was changed.
func (f *Facts) reloadUnits(flags ...string) shell.Line {
	for _, file := range f.filesWith(flags...) {
		if f.Systemd && strings.Contains(file, "/systemd/") {
			return shell.Command("systemctl daemon-reload")
		}
	}
	return shell.Line{}
}

// filesWith are the files in which any of these flags of the kubelet stands, each once.
func (f *Facts) filesWith(flags ...string) []string {
	var files []string
	seen := map[string]bool{"": true}
	for _, name := range flags {
		for _, flag := range f.Kubelet.Flags {
			if flag.Name == name && !seen[flag.File] {
				seen[flag.File] = true
				files = append(files, flag.File)
			}
		}
	}

	return files
}

// dropFlags is the line that takes flags with their values out of files.
func dropFlags(files []string, flags ...string) shell.Line {
	fix := shell.Command("sed -i -E")
	for _, flag := range flags {
		fix = fix.With("-e {}", "s/ ?--"+regexp.QuoteMeta(flag)+`(=[^ "]*| [^- "][^ "]*)?([ "]|$)/\2/g`)
	}
	return fix.Args(files...)
}
