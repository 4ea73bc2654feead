package packages

import (
	"bytes"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// tree lists the files and directories below a directory as "mode path".
func tree(t *testing.T, dir string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}

		info, err := os.Lstat(path)
		if err == nil {
			all = append(all, info.Mode().String()+" "+strings.TrimPrefix(path, dir))
		}

		return err
	})
	if err != nil {
		t.Fatal(err)
	}

	return all
}

// checkTree compares the files below a directory, without directories, with the expected lines.
func checkTree(t *testing.T, dir string, want []string) {
	t.Helper()
	got := slices.DeleteFunc(tree(t, dir), func(line string) bool { return line[0] == 'd' })
	slices.Sort(got)
	want = slices.Sorted(slices.Values(want))
	if !slices.Equal(got, want) {
		t.Errorf("installed files:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// installed lists the files of an installation.
func installed(prefix, units string) []string {
	return []string{
		"-rw-r--r-- /etc/default/cri-docker",
		"-rw-r--r-- " + units + "/cri-docker-log.service",
		"-rw-r--r-- " + units + "/cri-docker-log.socket",
		"-rw-r--r-- " + units + "/cri-docker.service",
		"-rw-r--r-- " + units + "/cri-docker.socket",
		"-rw-r--r-- " + prefix + "/share/bash-completion/completions/cri-dockerd",
		"-rw-r--r-- " + prefix + "/share/cri-dockerd/manifest",
		"-rw-r--r-- " + prefix + "/share/fish/vendor_completions.d/cri-dockerd.fish",
		"-rw-r--r-- " + prefix + "/share/man/man8/cri-dockerd.8.gz",
		"-rw-r--r-- " + prefix + "/share/zsh/site-functions/_cri-dockerd",
		"-rwxr-xr-x " + prefix + "/bin/containerd-shim-cri-dockerd-server",
		"-rwxr-xr-x " + prefix + "/bin/containerd-shim-cri-dockerd-v1",
		"-rwxr-xr-x " + prefix + "/bin/cri-dockerd",
	}
}

// program unpacks the packaged programs and returns the path of the daemon's.
func program(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, pattern := range []string{"*." + runtime.GOARCH + ".tgz", "*." + runtime.GOARCH + ".shim.tgz"} {
		run(t, "tar", "-xzf", onlyFile(t, packaged(t, first, runtime.GOARCH), pattern), "-C", dir)
	}
	return filepath.Join(dir, "cri-dockerd/cri-dockerd")
}

// TestMakeInstall installs and removes a program with make. The units name its path, and the
// removal leaves the tree of before.
func TestMakeInstall(t *testing.T) {
	bin := program(t)
	for _, row := range []struct{ prefix, units string }{
		{"/usr/local", "/usr/local/lib/systemd/system"},
		{"/usr", "/usr/lib/systemd/system"},
		{"/opt/cri", "/etc/systemd/system"},
	} {
		t.Run(row.prefix, func(t *testing.T) {
			dest := t.TempDir()
			run(t, "mkdir", "-p", filepath.Join(dest, row.prefix, "share/man/man8"), filepath.Join(dest, "etc"))
			before := tree(t, dest)
			args := []string{"-s", "-C", "../..", "BIN=" + bin, "DESTDIR=" + dest}
			if row.prefix != "/usr/local" { // the default
				args = append(args, "PREFIX="+row.prefix)
			}

			run(t, "make", append(args, "install")...)
			run(t, "make", append(args, "install")...) // an upgrade
			checkTree(t, dest, installed(row.prefix, row.units))
			for _, unit := range []string{"cri-docker.service", "cri-docker-log.service"} {
				b, err := os.ReadFile(filepath.Join(dest, row.units, unit))
				if err != nil || !bytes.Contains(b, []byte("\nExecStart="+row.prefix+"/bin/cri-dockerd ")) {
					t.Errorf("%s: %v\n%s", unit, err, b)
				}
			}

			run(t, "make", append(args, "uninstall")...)
			if after := tree(t, dest); !slices.Equal(before, after) {
				t.Errorf("after the removal:\n%q\nwant:\n%q", after, before)
			}
		})
	}
}

// TestInstallKeepsForeignFiles checks that neither an upgrade nor a removal changes or removes
// files of another origin or a changed configuration.
func TestInstallKeepsForeignFiles(t *testing.T) {
	bin, dest := program(t), t.TempDir()
	config := filepath.Join(dest, "etc/default/cri-docker")
	page := filepath.Join(dest, "usr/local/share/man/man8/other.8")
	install := func(args ...string) {
		t.Helper()
		cmd := exec.Command("../../install.sh", args...)
		cmd.Env = append(os.Environ(), "DESTDIR="+dest)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("install.sh %q: %v\n%s", args, err, out)
		}
	}

	install("--program", bin)
	for _, file := range []string{config, page} {
		if err := os.WriteFile(file, []byte("changed\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	install("--program", bin)
	install("--uninstall")
	checkTree(t, dest, []string{"-rw-r--r-- /etc/default/cri-docker", "-rw-r--r-- /usr/local/share/man/man8/other.8"})

	// A configuration from before the installation is not part of it.
	install("--program", bin)
	install("--uninstall")
	if b, err := os.ReadFile(config); err != nil || string(b) != "changed\n" {
		t.Errorf("configuration: %q, %v", b, err)
	}
}

// release serves a release by HTTP. change may replace the content of a file, nil removes it.
func release(t *testing.T, change func(name string, content []byte) []byte) string {
	t.Helper()
	dir := packaged(t, first, runtime.GOARCH)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := filepath.Base(r.URL.Path)
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			http.NotFound(w, r)
			return
		}

		size := len(content)
		if content = change(name, content); content == nil {
			http.NotFound(w, r)
			return
		}

		// Half of an archive is a response with a missing end.
		if len(content) == size/2 {
			w.Header().Set("Content-Length", strconv.Itoa(size))
		}
		_, _ = w.Write(content)
	}))
	t.Cleanup(server.Close)

	return server.URL + "/release/"
}

// installRelease runs install.sh for a release, and returns the directory of the installation.
// The script must not leave temporary files.
func installRelease(t *testing.T, args ...string) (dest, out string, err error) {
	t.Helper()
	dest = t.TempDir()
	tmp := t.TempDir()
	cmd := exec.Command("../../install.sh", args...)
	cmd.Env = append(os.Environ(), "DESTDIR="+dest, "TMPDIR="+tmp)
	b, err := cmd.CombinedOutput()
	if left := tree(t, tmp); len(left) > 0 {
		t.Errorf("temporary files: %q", left)
	}

	return dest, string(b), err
}

// TestInstallRelease installs releases from a directory and from an HTTP server.
func TestInstallRelease(t *testing.T) {
	unchanged := func(_ string, content []byte) []byte { return content }
	for name, args := range map[string][]string{
		"url":       {release(t, unchanged)},
		"version":   {"--version", first, release(t, unchanged)},
		"directory": {packaged(t, first, runtime.GOARCH)},
	} {
		t.Run(name, func(t *testing.T) {
			dest, out, err := installRelease(t, append(args, "--prefix", "/usr/local/")...)
			if err != nil || !strings.Contains(out, "installed cri-dockerd "+first+" (") {
				t.Fatalf("%v\n%s", err, out)
			}

			checkTree(t, dest, installed("/usr/local", "/usr/local/lib/systemd/system"))
		})
	}
}

// Changes of a release's file. Nil removes it.
func flip(b []byte) []byte    { b[len(b)/2] ^= 1; return b }
func longer(b []byte) []byte  { return append(b, 0) }
func half(b []byte) []byte    { return b[:len(b)/2] }
func nothing(_ []byte) []byte { return nil }

// without removes the line of a file from checksums.
func without(name string) func([]byte) []byte {
	return func(b []byte) []byte {
		var kept []byte
		for line := range bytes.Lines(b) {
			if !bytes.HasSuffix(line, []byte("  "+name+"\n")) {
				kept = append(kept, line...)
			}
		}

		return kept
	}
}

// TestInstallRefusesBadRelease checks that a damaged or incomplete release installs nothing, and
// that the message names the file.
func TestInstallRefusesBadRelease(t *testing.T) {
	archive, units := "cri-dockerd-"+first+"."+runtime.GOARCH+".tgz", "cri-dockerd-"+first+".units.tgz"
	for name, row := range map[string]struct {
		file   string // changed file
		change func([]byte) []byte
		args   []string
		want   string
	}{
		"corrupt program": {file: archive, change: flip, want: archive + " is corrupt"},
		"corrupt units":   {file: units, change: flip, want: units + " is corrupt"},
		"longer archive":  {file: archive, change: longer, want: archive + " is corrupt"},
		"truncated":       {file: archive, change: half, want: archive},
		"missing archive": {file: units, change: nothing, want: units + ": "},
		"no SHA256SUMS":   {file: "SHA256SUMS", change: nothing, want: "SHA256SUMS: "},
		"no checksum":     {file: "SHA256SUMS", change: without(units), want: "no checksum of " + units},
		"other version":   {args: []string{"--version", "9.9.9"}, want: "9.9.9"},
		"path as version": {args: []string{"--version", "../1"}, want: "../1 is not a version"},
		"quoted prefix":   {args: []string{"--prefix", "/usr/my local"}, want: "prefix /usr/my local"},
		"several versions": {
			file:   "SHA256SUMS",
			change: func(b []byte) []byte { return append(b, bytes.ReplaceAll(b, []byte(first), []byte("1.0.1"))...) },
			want:   "select one with --version: " + first + " 1.0.1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			url := release(t, func(file string, content []byte) []byte {
				if file == row.file {
					return row.change(content)
				}
				return content
			})

			dest, out, err := installRelease(t, append(row.args, url)...)
			if err == nil || !strings.Contains(out, row.want) {
				t.Errorf("%v, want an error with %q\n%s", err, row.want, out)
			}
			if left := tree(t, dest); len(left) > 0 {
				t.Errorf("installed files: %q", left)
			}
		})
	}
}

// installFromRelease installs a release on a node without packages, starts it, and removes it.
func (m machine) installFromRelease(t *testing.T) {
	t.Helper()
	dir := packaged(t, first, runtime.GOARCH)
	for name := range sums(t, dir) {
		m.Copy(t, filepath.Join(dir, name), "/tmp/release/"+name)
	}

	m.Copy(t, filepath.Join(dir, "SHA256SUMS"), "/tmp/release/SHA256SUMS")
	m.Run(t, "/tmp/release/install.sh", "/tmp/release")
	m.Run(t, "systemctl", "daemon-reload")
	m.Run(t, "systemctl", append([]string{"enable", "--now"}, all...)...)
	m.checkInstalled(t, first)

	out, err := m.Try("/tmp/release/install.sh", "--uninstall")
	if err == nil || !strings.Contains(out+err.Error(), "systemctl disable --now") {
		t.Errorf("removal of running units: %v\n%s", err, out)
	}

	m.Run(t, "systemctl", append([]string{"disable", "--now"}, all...)...)
	m.Run(t, "/tmp/release/install.sh", "--uninstall")
	m.checkAbsent(t, "uninstall", "/usr/local/bin/cri-dockerd", "/usr/local/lib/systemd/system/cri-docker.service",
		"/etc/default/cri-docker", "/usr/local/share/cri-dockerd")
}
