package packages

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// newKey creates a gpg home directory with a secret key.
func newKey(t *testing.T) (home string) {
	t.Helper()
	home, err := os.MkdirTemp("", "gpg-") // short: it contains sockets
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		run(t, "env", "GNUPGHOME="+home, "gpgconf", "--kill", "gpg-agent")
		os.RemoveAll(home)
	})
	run(t, "gpg", "--homedir", home, "--batch", "--quiet", "--passphrase", "", "--quick-generate-key",
		"Tests <tests@cri-dockerd.example.org>", "ed25519", "sign", "1d")

	return home
}

// repository creates the apt and rpm repositories of a version.
func repository(t *testing.T, gpgHome, key string) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "repo")
	run(t, "env", "GNUPGHOME="+gpgHome, "make", "-s", "-C", "../..", "repo", "GPG_KEY="+key,
		"PACKAGES="+packaged(t, first, runtime.GOARCH), "OUT="+dir)

	return dir
}

// change replaces the content of a file below a repository.
func change(t *testing.T, dir, pattern string, replace func([]byte) []byte) {
	t.Helper()
	file := onlyFile(t, dir, pattern)
	b, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, replace(b), 0o644)
	}

	if err != nil {
		t.Fatal(err)
	}
}

// download downloads the package from a repository with apt, in a root of its own.
func download(t *testing.T, repo, key string) (deb []byte, out string, err error) {
	t.Helper()
	server := httptest.NewServer(http.FileServer(http.Dir(repo)))
	defer server.Close()

	root := t.TempDir()
	for _, dir := range []string{"etc/apt/apt.conf.d", "etc/apt/preferences.d", "var/lib/apt/lists/partial",
		"var/lib/dpkg", "var/cache/apt/archives/partial", "work"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}

	source := fmt.Sprintf("deb [signed-by=%s] %s/deb stable main\n", key, server.URL)
	for file, content := range map[string]string{"etc/apt/sources.list": source, "var/lib/dpkg/status": ""} {
		if err := os.WriteFile(filepath.Join(root, file), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	for _, command := range []string{"update", "download"} {
		args := []string{"-q", "-o", "Dir=" + root, "-o", "Dir::State::status=" + root + "/var/lib/dpkg/status",
			"-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=0", "-o", "APT::Update::Error-Mode=any", command}
		if command == "download" {
			args = append(args, "cri-dockerd")
		}

		cmd := exec.Command("apt-get", args...)
		cmd.Dir = filepath.Join(root, "work")
		cmd.Env = append(os.Environ(), "LC_ALL=C", "http_proxy=", "APT_CONFIG=/dev/null")
		b, err := cmd.CombinedOutput()
		out += string(b)
		if err != nil {
			return nil, out, fmt.Errorf("apt-get %s: %w", command, err)
		}
	}

	deb, err = os.ReadFile(onlyFile(t, filepath.Join(root, "work"), "*.deb"))

	return deb, out, err
}

// TestAptRepository downloads the package with apt, which verifies its signature and checksum, and
// refuses changed repositories. TestNodeLifecycle installs from such a repository.
func TestAptRepository(t *testing.T) {
	home := newKey(t)
	signed := repository(t, home, "tests@cri-dockerd.example.org")
	key := filepath.Join(signed, "cri-dockerd.asc")
	deb, out, err := download(t, signed, key)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	want, err := os.ReadFile(onlyFile(t, packaged(t, first, runtime.GOARCH), "*.deb"))
	if err != nil || !bytes.Equal(deb, want) {
		t.Errorf("apt downloads another package, %v", err)
	}

	otherLabel := func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("Label: cri"), []byte("Label: CRI")) }
	release := "deb/dists/stable/"
	for name, row := range map[string]struct {
		change func(t *testing.T, dir string)
		want   string
	}{
		"package": {
			change: func(t *testing.T, dir string) { change(t, dir, "deb/pool/main/c/cri-dockerd/*.deb", flip) },
			want:   "Hash Sum mismatch",
		},
		"index": {
			change: func(t *testing.T, dir string) {
				change(t, dir, release+"main/binary-*/Packages.gz", flip)
				change(t, dir, release+"main/binary-*/Packages", flip)
			},
			want: "Hash Sum mismatch",
		},
		"InRelease": {
			change: func(t *testing.T, dir string) { change(t, dir, release+"InRelease", otherLabel) },
			want:   "BADSIG",
		},
		"Release": {
			change: func(t *testing.T, dir string) {
				run(t, "rm", filepath.Join(dir, release+"InRelease"))
				change(t, dir, release+"Release", otherLabel)
			},
			want: "BADSIG",
		},
		"no signature": {
			change: func(t *testing.T, dir string) {
				run(t, "rm", filepath.Join(dir, release+"InRelease"), filepath.Join(dir, release+"Release.gpg"))
			},
			want: "is not signed",
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "repo")
			run(t, "cp", "-r", signed, dir)
			row.change(t, dir)
			if _, out, err := download(t, dir, key); err == nil || !strings.Contains(out, row.want) {
				t.Errorf("%v, want an error with %q\n%s", err, row.want, out)
			}
		})
	}
}

// TestRPMRepository verifies the signature of the metadata, the checksums of the listed files, and
// the signature of the package. Changed files must be refused.
func TestRPMRepository(t *testing.T) {
	home := newKey(t)
	repo := repository(t, home, "tests@cri-dockerd.example.org")
	keys, db := t.TempDir(), t.TempDir()
	run(t, "chmod", "700", keys)
	run(t, "gpg", "--homedir", keys, "--batch", "--quiet", "--import", filepath.Join(repo, "cri-dockerd.asc"))
	run(t, "rpm", "--dbpath", db, "--import", filepath.Join(repo, "cri-dockerd.asc"))
	dir := filepath.Dir(onlyFile(t, repo, "rpm/*/repodata"))
	want := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	if got := filepath.Base(dir); got != want {
		t.Errorf("directory of the packages: %s, want %s", got, want)
	}

	metadata := filepath.Join(dir, "repodata/repomd.xml")
	verifyMetadata := []string{"--homedir", keys, "--batch", "--verify", metadata + ".asc", metadata}
	run(t, "gpg", verifyMetadata...)
	rpm := onlyFile(t, dir, "*.rpm")
	if out := run(t, "rpm", "--dbpath", db, "-K", rpm); !strings.Contains(out, "digests signatures OK") {
		t.Errorf("rpm -K: %s", out)
	}

	checkMetadata(t, dir, rpm)

	change(t, dir, "repodata/repomd.xml", flip)
	if out, err := exec.Command("gpg", verifyMetadata...).CombinedOutput(); err == nil {
		t.Errorf("gpg accepts changed metadata:\n%s", out)
	}

	change(t, dir, "*.rpm", flip)
	if out, err := exec.Command("rpm", "--dbpath", db, "-K", rpm).CombinedOutput(); err == nil {
		t.Errorf("rpm accepts a changed package:\n%s", out)
	}
}

// checkMetadata compares the files of a repository with their checksums in repomd.xml, and the
// package with its checksum in the primary index.
func checkMetadata(t *testing.T, dir, rpm string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "repodata/repomd.xml"))
	if err != nil {
		t.Fatal(err)
	}

	var index struct {
		Data []struct {
			Type     string `xml:"type,attr"`
			Checksum string `xml:"checksum"`
			Location struct {
				Href string `xml:"href,attr"`
			} `xml:"location"`
		} `xml:"data"`
	}
	if err := xml.Unmarshal(b, &index); err != nil || len(index.Data) == 0 {
		t.Fatalf("repomd.xml: %v\n%s", err, b)
	}

	primary := ""
	for _, d := range index.Data {
		file := filepath.Join(dir, d.Location.Href)
		if got := checksum(t, file); got != d.Checksum {
			t.Errorf("%s: checksum %s, repomd.xml has %s", d.Location.Href, got, d.Checksum)
		}
		if d.Type == "primary" {
			primary = run(t, "zcat", file)
		}
	}

	if !strings.Contains(primary, ">"+checksum(t, rpm)+"<") {
		t.Errorf("the primary index lacks the checksum of the package:\n%s", primary)
	}
}

func checksum(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}

	sum := sha256.Sum256(b)

	return hex.EncodeToString(sum[:])
}

// TestRepositoryKey checks that unsigned repositories need an explicit request.
func TestRepositoryKey(t *testing.T) {
	home := t.TempDir()
	run(t, "chmod", "700", home)
	for key, want := range map[string]string{
		"":                  "set GPG_KEY",
		"other@example.org": "gpg has no such secret key",
	} {
		cmd := exec.Command("../../hack/repo.sh")
		cmd.Env = append(os.Environ(), "GNUPGHOME="+home, "GPG_KEY="+key,
			"PACKAGES="+packaged(t, first, runtime.GOARCH), "OUT="+filepath.Join(t.TempDir(), "repo"))
		if out, err := cmd.CombinedOutput(); err == nil || !bytes.Contains(out, []byte(want)) {
			t.Errorf("GPG_KEY=%q: %v, want %q\n%s", key, err, want, out)
		}
	}

	repo := repository(t, home, "none")
	cmd := exec.Command("../../hack/repo.sh")
	cmd.Env = append(os.Environ(), "GPG_KEY=none", "PACKAGES="+packaged(t, first, runtime.GOARCH), "OUT="+home)
	if out, err := cmd.CombinedOutput(); err == nil || !bytes.Contains(out, []byte(home+" exists")) {
		t.Errorf("output to a foreign directory: %v\n%s", err, out)
	}

	key := filepath.Join(t.TempDir(), "absent.asc")
	if _, out, err := download(t, repo, key); err == nil || !strings.Contains(out, "is not signed") {
		t.Errorf("unsigned repository: %v\n%s", err, out)
	}
}

// installFromRepository installs the package on a node from a signed apt repository.
func (m machine) installFromRepository(t *testing.T) {
	t.Helper()
	repo := repository(t, newKey(t), "tests@cri-dockerd.example.org")
	err := filepath.WalkDir(repo, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			m.Copy(t, path, "/srv/repo"+strings.TrimPrefix(path, repo))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}

	m.WriteFile(t, "/etc/apt/sources.list.d/cri-dockerd.list",
		"deb [signed-by=/srv/repo/cri-dockerd.asc] file:/srv/repo/deb stable main\n", 0o644)
	only := []string{"-o", "Dir::Etc::SourceList=sources.list.d/cri-dockerd.list", "-o", "Dir::Etc::SourceParts=-"}
	m.apt(t, append(only, "update")...)
	m.apt(t, append(only, "install", "cri-dockerd")...)
	m.checkInstalled(t, first)
	m.apt(t, "purge", "cri-dockerd")
}
