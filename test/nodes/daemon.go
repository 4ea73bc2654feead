package nodes

import (
	"os/exec"
	"path/filepath"
	"strings"

	"cri-dockerd/test/engines"
)

// Endpoint is the daemon's socket in a node, as operators write it.
const Endpoint = "unix:///var/run/cri-dockerd.sock"

// StartWithDaemon starts a node that has the daemon under its own units.
func StartWithDaemon(tb engines.TB, c Config) *Node {
	tb.Helper()
	dir := tempDir(tb)
	tb.Cleanup(func() { removeAll(tb, dir) })
	program := filepath.Join(dir, "cri-dockerd")
	engines.Build(tb, program, "cri-dockerd/cmd/cri-dockerd", "", false)
	binds := map[string]string{"/usr/bin/cri-dockerd": program}
	units, err := filepath.Glob(filepath.Join(Repository(tb), "deploy/systemd/*"))
	if err != nil || len(units) == 0 {
		tb.Fatalf("node: no units: %v", err)
	}
	for _, u := range units {
		binds["/lib/systemd/system/"+filepath.Base(u)] = u
	}
	for path, file := range c.Binds {
		binds[path] = file
	}
	c.Binds = binds
	n := Start(tb, c)
	n.Run(tb, "systemctl", "enable", "--now", "cri-docker.service")
	return n
}

// Repository is the folder of this repository.
func Repository(tb engines.TB) string {
	tb.Helper()
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		tb.Fatalf("go env: %v", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out)))
}
