// Package packages tests the distribution packages. It builds them, checks their content, and
// installs, upgrades and removes them on nodes with running pods.
package packages

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"cri-dockerd/test/engines"
)

// Versions of the built packages. The second is an upgrade of the first.
const (
	first  = "1.0.0-dev"
	second = "1.0.0"
)

// maintainer is the maintainer in the metadata of the built packages.
const maintainer = "O'Tests: packages <tests@cri-dockerd.example.org>"

// outputDir is the output directory of package builds, shared by all tests.
var outputDir string

func TestMain(m *testing.M) {
	var err error
	if outputDir, err = os.MkdirTemp("", "cri-packages-"); err == nil {
		err = os.Chmod(outputDir, 0o755) // apt reads as a separate user
	}

	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}

	code := m.Run()
	os.RemoveAll(outputDir)
	os.Exit(code)
}

var builds sync.Map

// packaged builds the packages of a version and architecture once, and returns their directory.
func packaged(t *testing.T, version, arch string) string {
	t.Helper()
	once, _ := builds.LoadOrStore(version+arch, sync.OnceValues(func() (string, error) {
		out := filepath.Join(outputDir, version, arch)
		return out, build("../..", out, "VERSION="+version, "ARCHES="+arch)
	}))

	dir, err := once.(func() (string, error))()
	if err != nil {
		t.Fatal(err)
	}

	return dir
}

// build runs the build script of a source tree.
func build(root, out string, env ...string) error {
	cmd := exec.Command(filepath.Join(root, "hack/package.sh"))
	cmd.Env = append(append(os.Environ(), "MAINTAINER="+maintainer, "OUT="+out), env...)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("hack/package.sh: %w\n%s", err, msg)
	}
	return nil
}

// onlyFile returns the only file in a directory matching a pattern.
func onlyFile(t *testing.T, dir, pattern string) string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(all) != 1 {
		t.Fatalf("%s in %s: %q, %v", pattern, dir, all, err)
	}
	return all[0]
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w\n%s", err, exit.Stderr)
		}
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}

	return string(out)
}

// common lists the files of both packages with their modes.
var common = []string{
	"-rw-r--r-- /etc/default/cri-docker",
	"-rw-r--r-- /usr/lib/systemd/system/cri-docker-log.service",
	"-rw-r--r-- /usr/lib/systemd/system/cri-docker-log.socket",
	"-rw-r--r-- /usr/lib/systemd/system/cri-docker.service",
	"-rw-r--r-- /usr/lib/systemd/system/cri-docker.socket",
	"-rw-r--r-- /usr/share/bash-completion/completions/cri-dockerd",
	"-rw-r--r-- /usr/share/doc/cri-dockerd/README.md",
	"-rw-r--r-- /usr/share/doc/cri-dockerd/licenses.gz",
	"-rw-r--r-- /usr/share/doc/cri-dockerd/sbom.cdx.json",
	"-rw-r--r-- /usr/share/fish/vendor_completions.d/cri-dockerd.fish",
	"-rw-r--r-- /usr/share/man/man8/cri-dockerd.8.gz",
	"-rw-r--r-- /usr/share/doc/cri-dockerd/sbom-shim.cdx.json",
	"-rwxr-xr-x /usr/bin/containerd-shim-cri-dockerd-server",
	"-rwxr-xr-x /usr/bin/containerd-shim-cri-dockerd-v1",
	"-rwxr-xr-x /usr/bin/cri-dockerd",
}

// checkFiles compares lines "mode path owner" of a package with the expected ones.
func checkFiles(t *testing.T, got []string, own ...string) {
	t.Helper()
	var want []string
	for _, line := range append(own, common...) {
		want = append(want, line+" root/root")
	}

	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the package contains\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestDeb(t *testing.T) {
	deb := onlyFile(t, packaged(t, first, runtime.GOARCH), "*.deb")
	var files []string
	for line := range strings.Lines(run(t, "dpkg-deb", "-c", deb)) {
		f := strings.Fields(line) // mode owner size date time ./path
		if !strings.HasPrefix(line, "d") {
			files = append(files, f[0]+" "+strings.TrimPrefix(f[5], ".")+" "+
				strings.ReplaceAll(f[1], "0/0", "root/root"))
		}
	}

	checkFiles(t, files,
		"-rw-r--r-- /usr/share/doc/cri-dockerd/changelog.Debian.gz", "-rw-r--r-- /usr/share/doc/cri-dockerd/copyright",
		"-rw-r--r-- /usr/share/lintian/overrides/cri-dockerd",
		"-rw-r--r-- /usr/share/zsh/vendor-completions/_cri-dockerd")

	for field, want := range map[string]string{
		"Package": "cri-dockerd", "Architecture": runtime.GOARCH, "Version": "1.0.0~dev-1",
		"Depends": "docker.io | docker-ce | moby-engine", "Recommends": "containernetworking-plugins",
		"Maintainer": maintainer,
	} {
		if got := strings.TrimSpace(run(t, "dpkg-deb", "-f", deb, field)); got != want {
			t.Errorf("%s: %q, want %q", field, got, want)
		}
	}

	// versions of the older shim's packages with the same name
	for _, older := range []string{"0.4.99-3", "0.3.21.3-0.debian-bookworm"} {
		run(t, "dpkg", "--compare-versions", "1.0.0~dev-1", "gt", older)
	}

	if out, err := exec.Command("lintian", "--allow-root", "--fail-on", "error", "--tag-display-limit", "0",
		deb).CombinedOutput(); err != nil {
		t.Errorf("lintian: %v\n%s", err, out)
	}
}

// TestRPM checks the content of the rpm and installs it in a separate root without scripts. The
// scripts run in node tests.
func TestRPM(t *testing.T) {
	rpm := onlyFile(t, packaged(t, first, runtime.GOARCH), "*.rpm")
	var files []string
	for line := range strings.Lines(run(t, "rpm", "-qp", "--qf",
		"[%{FILEMODES:perms} %{FILENAMES} %{FILEUSERNAME}/%{FILEGROUPNAME}\n]", rpm)) {
		files = append(files, strings.TrimSuffix(line, "\n"))
	}

	checkFiles(t, files, "-rw-r--r-- /usr/share/licenses/cri-dockerd/LICENSE",
		"-rw-r--r-- /usr/share/zsh/site-functions/_cri-dockerd")
	if got := run(t, "rpm", "-qp", "--configfiles", rpm); got != "/etc/default/cri-docker\n" {
		t.Errorf("configuration files: %q", got)
	}

	if got := run(t, "rpm", "-qp", "--qf", "%{NAME} %{VERSION} %{RELEASE} %{LICENSE}",
		rpm); got != "cri-dockerd 1.0.0~dev 1 Apache-2.0" {
		t.Errorf("rpm header: %q", got)
	}

	if out := run(t, "rpm", "-K", rpm); !strings.Contains(out, "digests OK") {
		t.Errorf("rpm -K: %s", out)
	}

	// rpmlint unpacks with cpio, and nfpm writes absolute names: without the option the files would
	// land in the machine's own directories.
	bin := t.TempDir()
	wrapper := "#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin exec cpio --no-absolute-filenames \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "cpio"), []byte(wrapper), 0o755); err != nil {
		t.Fatal(err)
	}

	lint := exec.Command("rpmlint", "-c", "../../deploy/package/rpm/rpmlint.toml", rpm)
	lint.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	out, err := lint.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte(" 0 errors")) {
		t.Errorf("rpmlint: %v\n%s", err, out)
	}

	root := t.TempDir()
	run(t, "rpm", "--root", root, "--nodeps", "--noscripts", "-i", rpm)
	run(t, "rpm", "--root", root, "--nodeps", "--noscripts", "-V", "cri-dockerd")
	run(t, "rpm", "--root", root, "--noscripts", "-e", "cri-dockerd")
	if _, err := os.Lstat(filepath.Join(root, "usr/bin/cri-dockerd")); !os.IsNotExist(err) {
		t.Errorf("after rpm -e: %v", err)
	}
}

// TestArchive checks the tgz: a directory with the program and nothing else, as expected by
// installers of the older shim.
func TestArchive(t *testing.T) {
	f, err := os.Open(onlyFile(t, packaged(t, first, runtime.GOARCH), "*."+runtime.GOARCH+".tgz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}

	var got []string
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}

		if err != nil {
			t.Fatal(err)
		}

		got = append(got, fmt.Sprintf("%o %d:%d %s", h.Mode, h.Uid, h.Gid, h.Name))
	}

	if want := []string{"755 0:0 cri-dockerd/", "755 0:0 cri-dockerd/cri-dockerd"}; !slices.Equal(got, want) {
		t.Errorf("the archive contains %q", got)
	}
}

// TestProgram verifies that the packaged program is static, reports its version, and is not too
// large. It also checks the man page and completions.
func TestProgram(t *testing.T) {
	root := t.TempDir()
	run(t, "dpkg-deb", "-x", onlyFile(t, packaged(t, first, runtime.GOARCH), "*.deb"), root)
	program := filepath.Join(root, "usr/bin/cri-dockerd")
	checkStatic(t, program)
	line := run(t, program, "--version")
	if !strings.HasPrefix(line, "cri-dockerd "+first+" (") || strings.Count(line, "\n") != 1 {
		t.Errorf("--version: %q", line)
	}
	if st, err := os.Stat(program); err != nil || st.Size() > 24<<20 {
		t.Errorf("size: %v, %v", st, err)
	}

	run(t, "bash", "-n", filepath.Join(root, "usr/share/bash-completion/completions/cri-dockerd"))
	man := exec.Command("man", "--warnings", "-l", filepath.Join(root, "usr/share/man/man8/cri-dockerd.8.gz"))
	var warnings bytes.Buffer
	man.Stderr = &warnings
	if page, err := man.Output(); err != nil || warnings.Len() > 0 || !bytes.Contains(page, []byte("EXIT STATUS")) {
		t.Errorf("man: %v, %s\n%s", err, warnings.Bytes(), page)
	}

	licenses, err := exec.Command("zcat", filepath.Join(root, "usr/share/doc/cri-dockerd/licenses.gz")).Output()
	if err != nil {
		t.Fatal(err)
	}

	launcher, server := filepath.Join(root, "usr/bin", engines.ShimPrograms[0]),
		filepath.Join(root, "usr/bin", engines.ShimPrograms[1])
	for _, module := range append(linked(t, program), linked(t, server)...) {
		if !bytes.Contains(licenses, []byte("==== "+module)) {
			t.Errorf("licenses.gz lacks %s", module)
		}
	}

	for shim, limit := range map[string]int64{launcher: 4 << 20, server: 12 << 20} {
		checkStatic(t, shim)
		if st, err := os.Stat(shim); err != nil || st.Size() > limit {
			t.Errorf("size of %s: %v, %v", shim, st, err)
		}
	}
}

func checkStatic(t *testing.T, program string) {
	t.Helper()
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	if libs, err := f.ImportedLibraries(); err != nil || len(libs) > 0 || f.Section(".interp") != nil {
		t.Errorf("dynamic libraries %q, %v", libs, err)
	}
}

// linked returns the modules of a program as path@version, with the capitals of the module cache.
func linked(t *testing.T, program string) (all []string) {
	t.Helper()
	for line := range strings.Lines(run(t, "go", "version", "-m", program)) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == "dep" {
			path := ""
			for _, r := range f[1] {
				if r >= 'A' && r <= 'Z' {
					path += "!" + strings.ToLower(string(r))
				} else {
					path += string(r)
				}
			}

			all = append(all, path+"@"+f[2])
		}
	}

	if len(all) == 0 {
		t.Fatal("no modules in the program")
	}

	return all
}

// TestSBOM requires every linked module in the SBOM, with its version.
func TestSBOM(t *testing.T) {
	dir := packaged(t, first, runtime.GOARCH)
	root := t.TempDir()
	run(t, "tar", "-xzf", onlyFile(t, dir, "*."+runtime.GOARCH+".tgz"), "-C", root)
	b, err := os.ReadFile(onlyFile(t, dir, "*.sbom.cdx.json"))
	if err != nil {
		t.Fatal(err)
	}

	var bom struct {
		BOMFormat  string `json:"bomFormat"`
		Components []struct{ Name, Version string }
	}

	if err := json.Unmarshal(b, &bom); err != nil || bom.BOMFormat != "CycloneDX" {
		t.Fatalf("%v, format %q", err, bom.BOMFormat)
	}

	var got []string
	for _, c := range bom.Components {
		got = append(got, c.Name+" "+c.Version)
	}

	for line := range strings.Lines(run(t, "go", "version", "-m", filepath.Join(root, "cri-dockerd/cri-dockerd"))) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == "dep" && !slices.Contains(got, f[1]+" "+f[2]) {
			t.Errorf("the SBOM lacks %s %s", f[1], f[2])
		}
	}
}

func TestChecksums(t *testing.T) {
	dir := packaged(t, first, runtime.GOARCH)
	if sums := sums(t, dir); len(sums) != 7 {
		t.Errorf("%d files: %v", len(sums), sums)
	} else {
		for name, sum := range sums {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if got := sha256.Sum256(b); err != nil || hex.EncodeToString(got[:]) != sum {
				t.Errorf("%s: %v, sum %x", name, err, got)
			}
		}
	}
}

// sums returns the lines of SHA256SUMS by file.
func sums(t *testing.T, dir string) map[string]string {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	out := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		sum, name, _ := strings.Cut(s.Text(), "  ")
		out[name] = sum
	}

	return out
}

// TestReproducible builds from a copy of the source in another directory and at another time. The
// packages must be identical.
func TestReproducible(t *testing.T) {
	want := sums(t, packaged(t, first, runtime.GOARCH))
	root := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}

	for _, name := range []string{"cmd", "internal", "deploy", "hack", "go.mod", "go.sum", "Makefile", "README.md",
		"CHANGELOG.md", "LICENSE", "install.sh"} {
		run(t, "cp", "-r", filepath.Join("../..", name), root)
	}

	git := func(args ...string) string {
		out, err := exec.Command("git", append([]string{"-C", "../.."}, args...)...).Output()
		if err != nil {
			return "" // not a checkout; the copy has the same times
		}
		return strings.TrimSpace(string(out))
	}

	out := t.TempDir()
	err := build(root, out, "VERSION="+first, "ARCHES="+runtime.GOARCH, "SOURCE_DATE_EPOCH="+
		git("log", "-1", "--format=%ct"), "COMMIT="+git("rev-parse", "--short=12", "HEAD"))
	if err != nil {
		t.Fatal(err)
	}

	for name, sum := range sums(t, out) {
		if want[name] != sum {
			t.Errorf("%s: %s, want %s", name, sum, want[name])
		}
	}
}

// TestOtherArchitecture verifies the architecture of packages and program built for the other
// architecture.
func TestOtherArchitecture(t *testing.T) {
	other, machine := "arm64", elf.EM_AARCH64
	if runtime.GOARCH == other {
		other, machine = "amd64", elf.EM_X86_64
	}

	dir, root := packaged(t, first, other), t.TempDir()
	deb := onlyFile(t, dir, "*.deb")
	if got := strings.TrimSpace(run(t, "dpkg-deb", "-f", deb, "Architecture")); got != other {
		t.Errorf("Architecture: %q", got)
	}

	if got, want := run(t, "rpm", "-qp", "--qf", "%{ARCH}", onlyFile(t, dir, "*.rpm")),
		map[string]string{"arm64": "aarch64", "amd64": "x86_64"}[other]; got != want {
		t.Errorf("rpm's architecture: %q", got)
	}

	run(t, "dpkg-deb", "-x", deb, root)
	program := filepath.Join(root, "usr/bin/cri-dockerd")
	checkStatic(t, program)
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	if f.Machine != machine {
		t.Errorf("the program is for %s", f.Machine)
	}
}

// TestUnitsAreHardened limits systemd's exposure score (10 for all privileges of root). Comments in
// the units explain the remaining exposure.
func TestUnitsAreHardened(t *testing.T) {
	for unit, threshold := range map[string]string{"cri-docker.service": "61", "cri-docker-log.service": "30"} {
		out, err := exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold="+
			threshold, "../../deploy/systemd/"+unit).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", unit, err, out)
		}
	}
}
