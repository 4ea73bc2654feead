package finding

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"cri-dockerd/internal/shell"
)

// thenRestartKubelet adds a restart of the kubelet to a line. Without systemd, it adds a note
// instead.
func (f *Facts) thenRestartKubelet(line shell.Line) shell.Line {
	if f.Systemd {
		return line.And(shell.Command("systemctl restart kubelet"))
	}
	return line.Note("then restart kubelet")
}

// isFlagName reports whether a name is safe in an expression of sed.
func isFlagName(s string) bool {
	return s != "" && s[0] != '-' && len(s) < 100 && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-')
	})
}

// startEngine returns the line to start or restart Docker.
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

// daemonUnit returns the name of the daemon's service.
func (f *Facts) daemonUnit() string {
	if f.Daemon.Unit == "" {
		return "cri-docker"
	}
	return f.Daemon.Unit
}

// startDaemon returns the line to start or restart the daemon.
func (f *Facts) startDaemon(verb string) shell.Line {
	if f.Systemd && f.Daemon.Unit != "" {
		return shell.Command("systemctl {} {}", verb, f.Daemon.Unit)
	}
	return f.Flags.Command.Detached("/var/log/cri-dockerd.log")
}

// setDaemonJSON returns the line to set a top-level key of Docker's daemon.json and to apply it.
// then is the verb of systemctl.
func (f *Facts) setDaemonJSON(key, value, then string) shell.Line {
	c := f.Engine.Config
	if c.Error != "" { // the file's content is unknown
		return shell.Advice("set {} to {} in {}", key, value, c.File)
	}

	set := fmt.Sprintf(`"%s": %s`, key, value)
	var line shell.Line
	switch _, there := c.Keys[key]; {
	case len(c.Keys) == 0:
		line = shell.Command("mkdir -p {} && echo {} > {}", dirOf(c.File), "{"+set+"}", c.File)
	// the pattern matches words and numbers; no caller sets a list or an object
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

// setKubelet returns the line to set a key of the kubelet's configuration. It also removes the
// corresponding flag, which would override the key.
func (f *Facts) setKubelet(key, value, flag string) shell.Line {
	if !shell.IsPlain(value) {
		return shell.Advice("set {} to {} in the configuration of the kubelet", key, value)
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

	return f.thenRestartKubelet(fix.And(f.reloadUnits(flag)))
}

// extraArgs is the file for the operator's own kubelet flags. The kubelet's packages define it.
const extraArgs = "/etc/default/kubelet"

// addKubeletFlag returns the line to add a plain flag to the operator's flags. The last assignment
// in the file is in effect.
func addKubeletFlag(file, flag string) shell.Line {
	change := `s#^KUBELET_EXTRA_ARGS="?([^"]*)"?$#KUBELET_EXTRA_ARGS="\1 ` + flag + `"#`
	add := `KUBELET_EXTRA_ARGS="` + flag + `"`
	return shell.Command("{ grep -qs ^KUBELET_EXTRA_ARGS= {} && sed -i -E {} {} || echo {} >> {}; }",
		file, change, file, add, file)
}

// reloadUnits returns the line to reload systemd's units if one of them has any of the flags.
func (f *Facts) reloadUnits(flags ...string) shell.Line {
	for _, file := range f.filesWith(flags...) {
		if f.Systemd && strings.Contains(file, "/systemd/") {
			return shell.Command("systemctl daemon-reload")
		}
	}
	return shell.Line{}
}

// filesWith returns the files with any of these kubelet flags, each once.
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

// dropFlags returns the line to remove flags and their values from files.
func dropFlags(files []string, flags ...string) shell.Line {
	fix := shell.Command("sed -i -E")
	for _, flag := range flags {
		fix = fix.With("-e {}", "s/ ?--"+regexp.QuoteMeta(flag)+`(=[^ "]*| [^- "][^ "]*)?([ "]|$)/\2/g`)
	}
	return fix.Args(files...)
}
