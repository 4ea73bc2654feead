package finding

import (
	"fmt"
	"regexp"
	"strings"
)

// restarted is a command line after which a service is restarted; without systemd the reader is told to do so.
func (f *Facts) restarted(line, unit string) string {
	if f.Systemd {
		return line + " && systemctl restart " + unit
	}
	return line + "  # then restart " + unit
}

// startEngine is the line that starts Docker.
func (f *Facts) startEngine(verb string) string {
	switch {
	case !f.Engine.Installed:
		return f.install("docker.io", "Docker Engine: https://docs.docker.com/engine/install/")
	case f.Systemd:
		return "systemctl " + verb + " docker"
	case f.Engine.SysV:
		return "service docker " + verb
	}
	return "nohup dockerd >>/var/log/docker.log 2>&1 &"
}

// install is the line that installs a Debian package, or elsewhere what to install.
func (f *Facts) install(debian, elsewhere string) string {
	if f.Debian {
		return "apt-get update && apt-get install -y " + debian
	}
	return "install " + elsewhere
}

// daemonUnit is the daemon's service.
func (f *Facts) daemonUnit() string {
	if f.Daemon.Unit == "" {
		return "cri-docker"
	}
	return f.Daemon.Unit
}

// startDaemon is the line that starts the daemon, or starts it anew.
func (f *Facts) startDaemon(verb string) string {
	if f.Systemd && f.Daemon.Unit != "" {
		return "systemctl " + verb + " " + f.Daemon.Unit
	}
	return "nohup " + f.Flags.Command + " >>/var/log/cri-dockerd.log 2>&1 &"
}

// setDaemonJSON is the line that sets a key at the top of Docker's daemon.json, and what makes the engine read it.
func (f *Facts) setDaemonJSON(key, value, then string) string {
	c := f.Engine.Config
	set := fmt.Sprintf(`"%s": %s`, key, value)
	var line string
	switch _, there := c.Keys[key]; {
	case len(c.Keys) == 0:
		line = fmt.Sprintf(`mkdir -p %s && echo '{%s}' > %s`, dirOf(c.File), set, c.File)
	case there: // a word or number; a list or object is not replaced so simply, and none is set here
		line = fmt.Sprintf(`sed -i -E 's/"%s": *[^,} ]+/%s/' %s`, key, set, c.File)
	default:
		line = fmt.Sprintf(`sed -i '0,/{/s/{/{%s, /' %s`, set, c.File)
	}
	if f.Systemd {
		return line + " && systemctl " + then + " docker"
	}
	return line + " && kill -HUP $(pidof dockerd)"
}

func dirOf(file string) string { return file[:max(strings.LastIndexByte(file, '/'), 0)] }

// setKubelet is the line that sets a key of the kubelet's configuration and, if it is given by a flag, takes away that.
func (f *Facts) setKubelet(key, value, flag string) string {
	var parts []string
	if files := f.filesWith(flag); len(files) > 0 {
		parts = append(parts, dropFlags(files, flag))
	}
	if file := f.Kubelet.ConfigFile; file == "" {
		parts = append(parts, addKubeletFlag("--"+flag+"="+value))
	} else {
		parts = append(parts, fmt.Sprintf(`sed -i -e '/^%s:/d' -e '$a\' %s && echo '%s: %s' >> %s`, key, file, key, value, file))
	}
	return f.restarted(strings.Join(parts, " && ")+f.reloadUnits(flag), "kubelet")
}

// extraArgs is the file of flags that the kubelet's packages leave to the operator.
const extraArgs = "/etc/default/kubelet"

// addKubeletFlag is the line that adds a flag to those of the operator; the last assignment in the file is the one that holds.
func addKubeletFlag(flag string) string {
	return fmt.Sprintf(`{ grep -qs ^KUBELET_EXTRA_ARGS= %[1]s && sed -i -E 's#^KUBELET_EXTRA_ARGS="?([^"]*)"?$#KUBELET_EXTRA_ARGS="\1 %[2]s"#' %[1]s || echo 'KUBELET_EXTRA_ARGS="%[2]s"' >> %[1]s; }`,
		extraArgs, flag)
}

// reloadUnits makes systemd read units anew in which a flag was changed.
func (f *Facts) reloadUnits(flags ...string) string {
	for _, file := range f.filesWith(flags...) {
		if f.Systemd && strings.Contains(file, "/systemd/") {
			return " && systemctl daemon-reload"
		}
	}
	return ""
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
func dropFlags(files []string, flags ...string) string {
	var b strings.Builder
	b.WriteString("sed -i -E")
	for _, flag := range flags {
		fmt.Fprintf(&b, ` -e 's/ ?--%s(=[^ "]*| [^- "][^ "]*)?([ "]|$)/\2/g'`, regexp.QuoteMeta(flag))
	}
	for _, file := range files {
		b.WriteString(" " + file)
	}
	return b.String()
}
