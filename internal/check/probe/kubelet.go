package probe

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"cri-dockerd/internal/check/finding"
)

// Paths of kubeadm and of the kubelet's packages.
const (
	kubeletConfig = "/var/lib/kubelet/config.yaml"
	kubeletUnit   = "kubelet.service"
)

// flagFiles returns the files with kubelet flags of kubeadm, Debian and Red Hat. They count only
// without a unit.
func flagFiles() []string {
	return []string{"/var/lib/kubelet/kubeadm-flags.env", "/etc/default/kubelet", "/etc/sysconfig/kubelet"}
}

// kubelet gathers the kubelet's program, flags and configuration. It does not need a running
// kubelet.
func (p *Prober) kubelet(ctx context.Context) finding.Kubelet {
	k := finding.Kubelet{
		Joined: p.exists("/etc/kubernetes/kubelet.conf"),
		Admin:  p.exists("/etc/kubernetes/admin.conf"),
	}
	if _, err := exec.LookPath("kubeadm"); err == nil {
		k.Kubeadm = true
	}

	program, words := p.kubeletCommand()
	k.Flags = kubeletFlags(words)
	k.ConfigFile = kubeletConfig
	var dir string
	for _, f := range k.Flags {
		switch f.Name {
		case "config":
			k.ConfigFile = f.Value
		case "config-dir":
			dir = f.Value
		}
	}

	if !p.exists(k.ConfigFile) {
		k.ConfigFile = ""
	} else if err := p.readConfig(k.ConfigFile, dir, &k.Config); err != nil {
		k.ConfigErr = err.Error()
	}

	k.Present = program != "" || k.ConfigFile != "" || len(k.Flags) > 0
	if program == "" {
		program, _ = exec.LookPath("kubelet") // "" if there is none
		k.Present = k.Present || program != ""
	}

	if program != "" {
		k.Version = p.programVersion(ctx, program)
		k.Minor = minor(k.Version)
	}

	return k
}

// programVersion returns the version of a kubelet's program, "" if it is unknown or if users other
// than root can change the program.
func (p *Prober) programVersion(ctx context.Context, program string) string {
	f, err := p.open(program)
	if err != nil {
		return ""
	}
	defer f.Close()
	return kubeletVersion(ctx, f)
}

// minor returns the minor version: 36 for v1.36.3, 0 for other strings.
func minor(version string) int {
	parts := strings.Split(strings.TrimPrefix(version, "v"), ".")
	if len(parts) < 2 || parts[0] != "1" {
		return 0
	}

	n, err := strconv.Atoi(parts[1])
	if err != nil {
		return 0
	}

	return n
}

// kubeletCommand returns the program of the kubelet, "" if unknown, and its flags: from its unit
// or, without one, from flagFiles, followed by additional flags of the running process.
func (p *Prober) kubeletCommand() (program string, words []word) {
	words = p.command(kubeletUnit)
	if len(words) > 0 {
		program, words = words[0].text, words[1:]
	} else {
		for _, file := range flagFiles() {
			for _, assignment := range p.environmentFile(file) {
				_, value, _ := strings.Cut(assignment, "=")
				for _, w := range split(value) {
					words = append(words, word{w, file})
				}
			}
		}
	}

	running := p.proc.Find(func(name string) bool { return name == "kubelet" })
	if len(running) > 0 {
		program = running[0].Program
		words = append(words, unseen(running[0].Args, words)...)
	}

	return program, words
}

// unseen returns the arguments missing from words.
func unseen(args []string, words []word) []word {
	known := map[string]bool{}
	for _, w := range words {
		known[w.text] = true
	}

	var out []word
	for _, a := range args {
		if !known[a] {
			out = append(out, word{text: a})
		}
	}

	return out
}

// kubeletFlags parses --name=value, --name value and --name (true).
func kubeletFlags(words []word) []finding.Flag {
	var out []finding.Flag
	for i, w := range words {
		name, isFlag := strings.CutPrefix(w.text, "--")
		if !isFlag || name == "" {
			continue
		}

		f := finding.Flag{File: w.file}
		var given bool
		if f.Name, f.Value, given = strings.Cut(name, "="); !given {
			f.Value = "true"
			if i+1 < len(words) && !strings.HasPrefix(words[i+1].text, "-") {
				f.Value = words[i+1].text
			}
		}

		out = append(out, f)
	}

	return out
}

// readConfig reads the kubelet's configuration and its drop-ins (--config-dir). Drop-ins override
// it.
func (p *Prober) readConfig(file, dir string, into *finding.KubeletConfig) error {
	files := []string{file}
	if dir != "" {
		files = append(files, p.glob(dir+"/*.conf")...)
	}

	for _, f := range files[:min(len(files), maxFiles)] {
		b, err := p.trusted(f)
		if err == nil {
			err = yaml.Unmarshal(b, into)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
	}

	return nil
}
