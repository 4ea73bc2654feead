package nodes

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"cri-dockerd/test/engines"
)

// Endpoint is the CRI endpoint of a node, as in the documentation.
const Endpoint = "unix:///var/run/cri-dockerd.sock"

// StartWithDaemon starts a node and installs the Debian package of the daemon.
func StartWithDaemon(tb engines.TB, c Config) *Node {
	tb.Helper()
	deb, err := buildPackage()
	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	n := Start(tb, c)
	n.WriteFile(tb, "/tmp/cri-dockerd.deb", deb, 0o644)
	n.Run(tb, "rm", "-f", "/var/lib/man-db/auto-update") // skip the index of manual pages
	n.Run(tb, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "-q", "install", "/tmp/cri-dockerd.deb")

	return n
}

// buildPackage builds the Debian package of this source tree, once.
var buildPackage = sync.OnceValues(func() (string, error) {
	root, err := repository()
	if err != nil {
		return "", err
	}

	dir, err := os.MkdirTemp("", "cri-package-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)

	cmd := exec.Command(filepath.Join(root, "hack/package.sh"))
	cmd.Env = append(os.Environ(), "VERSION=1.0.0-dev", "MAINTAINER=Tests <tests@cri-dockerd.example.org>",
		"ARCHES="+runtime.GOARCH, "OUT="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("hack/package.sh: %w\n%s", err, out)
	}

	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("hack/package.sh: got packages %q, want one: %w", debs, err)
	}

	deb, err := os.ReadFile(debs[0])

	return string(deb), err
})

// repository returns the root directory of this repository.
func repository() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}
