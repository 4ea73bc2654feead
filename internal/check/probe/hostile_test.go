package probe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/check/finding"
)

// inputFiles are the inputs of check, one of each kind.
func inputFiles() []string {
	return []string{
		"/etc/docker/daemon.json", "/var/lib/kubelet/config.yaml", "/var/lib/kubelet/kubeadm-flags.env",
		"/etc/default/kubelet", "/etc/systemd/system/kubelet.service",
		"/etc/systemd/system/kubelet.service.d/10.conf", "/etc/systemd/system/cri-docker.service",
		"/etc/systemd/system/cri-docker.socket", "/etc/default/cri-docker", "/etc/fstab", "/etc/group",
		"/etc/cni/net.d/10-x.conflist", "/etc/cni/net.d/20-x.conf", "/etc/kubernetes/kubelet.conf",
		"/usr/bin/kubelet", "/proc/5/cmdline",
	}
}

// contents returns possible contents of files of other users.
func contents() map[string]string {
	aliases := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'n'; c++ {
		aliases += fmt.Sprintf("%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n", c, c, c-1, c-1, c-1, c-1, c-1, c-1,
			c-1, c-1, c-1)
	}

	return map[string]string{
		"deep YAML": strings.Repeat("[", 500_000), "deep YAML maps": strings.Repeat("{a: ", 200_000),
		"deep JSON":     strings.Repeat(`{"a":`, 150_000),
		"aliases":       aliases + "featureGates: *m\nevictionHard: *m\n",
		"indented YAML": strings.Repeat(" ", 100_000) + "a: b\n",
		"long word":     "KUBELET_EXTRA_ARGS=--" + strings.Repeat("x", 1_000_000),
		"many words":    strings.Repeat("--a ", 250_000),
		"invalid":       "\xff\xfe\x00\x1b[2J",
		"YAML of strings": "cgroupDriver: \"a\\eb\\n; rm -rf /\"\ncontainerRuntimeEndpoint: \"$(touch " +
			"/evil)\\u001b[2J\"\nevictionHard: {\"nodefs.available\": \"\\e[31m\"}\n",
		"unit": "[Service]\nEnvironment=\"A=--x '; touch /evil\"\nExecStart=/usr/bin/kubelet $A --config=/dev/zero " +
			"--container-runtime-endpoint=$(touch /evil) --pod-infra-container-image=\x1b[2J\n",
		"JSON": `{"live-restore": "\u001b[2J", "log-opts": [], "a\nb": 1, "exec-opts": {"x": 1e999}}`,
		"CNI":  `{"cniVersion":"1.0.0","name":"\u001b[2J;evil","plugins":[{"type":"../../../bin/sh"},{"type":"-rf"}]}`,
	}
}

// hostileFile creates a file of one kind.
type hostileFile struct {
	name    string
	create  func(file string) error
	trusted bool // check may read its content
}

func hostileFiles() []hostileFile {
	write := func(content string) func(string) error {
		return func(file string) error { return os.WriteFile(file, []byte(content), 0o644) }
	}
	all := []hostileFile{
		{"FIFO", func(file string) error { return unix.Mkfifo(file, 0o644) }, false},
		{"directory", func(file string) error { return os.Mkdir(file, 0o755) }, false},
		{"link to itself", func(file string) error { return os.Symlink(file, file) }, false},
		{"link to a device", func(file string) error { return os.Symlink("/dev/zero", file) }, false},
		{"device", func(file string) error {
			return unix.Mknod(file, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5)))
		}, false},
		{"sparse", func(file string) error {
			return errors.Join(os.WriteFile(file, nil, 0o644), os.Truncate(file, 1<<42))
		}, false},
		{"huge", write(strings.Repeat("a: b\n", 4<<20)), false},
		{"writable", func(file string) error {
			return errors.Join(write("cgroupDriver: evil\n[Service]\nExecStart=/evil --evil\n")(file),
				os.Chmod(file, 0o666))
		}, false},
		{"other owner", func(file string) error {
			return errors.Join(write("cgroupDriver: evil\n[Service]\nExecStart=/evil --evil\n")(file),
				os.Chown(file, 65534, 65534))
		}, false},
	}

	for name, content := range contents() {
		all = append(all, hostileFile{name, write(content), true})
	}

	slices.SortFunc(all, func(a, b hostileFile) int { return strings.Compare(a.name, b.name) })

	return all
}

// TestHostileFiles replaces each input file with each kind of hostile file. Probes must end in
// time, findings must be bounded and printable, and check must report untrusted files.
func TestHostileFiles(t *testing.T) {
	for _, h := range hostileFiles() {
		t.Run(h.name, func(t *testing.T) {
			t.Parallel()
			for _, name := range inputFiles() {
				if strings.HasPrefix(name, "/proc/") && !h.trusted {
					continue // procfs has regular files only
				}
				probeHostileFile(t, h, name)
			}
		})
	}
}

func probeHostileFile(t *testing.T, h hostileFile, name string) {
	t.Helper()
	p := tree(t, map[string]string{
		"/etc/systemd/system/kubelet.service": "[Service]\nEnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env\n" +
			"ExecStart=/usr/bin/kubelet --config=/var/lib/kubelet/config.yaml $KUBELET_KUBEADM_ARGS\n",
		"/proc/5/cmdline": "/usr/bin/kubelet\x00--v=2\x00",
	})

	// long enough for working probes on a busy machine
	p.timeout = 20 * time.Second
	file := p.path(name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.RemoveAll(file), h.create(file)); err != nil {
		t.Fatal(err)
	}

	start := time.Now()
	cfg, given := flagsOf(t, "--docker-endpoint=unix:///none.sock", "--container-runtime-endpoint=unix:///none.sock")
	found := p.Adopt(t.Context(), cfg, given)
	cfg.CNIConfDir = "/etc/cni/net.d"
	facts := p.Gather(t.Context(), cfg, found)
	all := finding.Evaluate(facts)
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("%s: probes took %s", name, took)
	}

	out, err := json.Marshal(all)
	if err != nil || len(out) > 256<<10 {
		t.Errorf("%s: %d bytes, %v", name, len(out), err)
	}

	for _, f := range all {
		s := f.Detail + f.Fix.String()
		if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool {
			return unicode.IsControl(r) && r != '\n' && r != '\t'
		}) {
			t.Errorf("%s: %s: %.200q", name, f.ID, s)
		}

		if strings.Contains(f.Fix.String(), "touch /evil") && strings.HasPrefix(f.Fix.String(), "sed") {
			t.Errorf("%s: %s: %s", name, f.ID, f.Fix)
		}
	}

	untrusted := h.name == "writable" || h.name == "other owner"
	if untrusted && name != "/etc/kubernetes/kubelet.conf" {
		reported := slices.ContainsFunc(facts.Untrusted, func(u finding.Untrusted) bool { return u.File == name })
		unused := []string{
			"/etc/systemd/system/cri-docker.socket", "/etc/default/cri-docker", "/etc/default/kubelet",
		}
		if !reported && !slices.Contains(unused, name) {
			t.Errorf("%s: missing from untrusted files %+v", name, facts.Untrusted)
		}

		if strings.Contains(string(out), "evil") {
			t.Errorf("%s: untrusted content in findings: %s", name, out)
		}
	}
}

// TestBlockedProbe checks that a blocked probe is abandoned.
func TestBlockedProbe(t *testing.T) {
	block := make(chan struct{})
	defer close(block)

	start := time.Now()
	f := &finding.Facts{}
	for _, addTo := range begin(t.Context(), 100*time.Millisecond, []probe{
		func(context.Context) result { <-block; return func(f *finding.Facts) { f.Debian = true } },
		func(context.Context) result { return func(f *finding.Facts) { f.Systemd = true } },
	})() {
		addTo(f)
	}

	if took := time.Since(start); took > 2*time.Second || f.Debian || !f.Systemd {
		t.Errorf("after %s: %+v", took, f)
	}
}
