package nodes

import (
	"os"
	"path/filepath"

	"cri-dockerd/test/engines"
)

// withoutCRI is containerd's configuration without its own CRI server.
const withoutCRI = "version = 3\ndisabled_plugins = ['io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', " +
	"'io.containerd.grpc.v1.cri']\n"

// addEngine adds the programs of the engine, and a wrapper before its runc for machines without
// CAP_SYS_RESOURCE. It returns the bind mounts of the programs, one per line.
func (n *Node) addEngine(tb engines.TB, v engines.Version) (binds string) {
	tb.Helper()
	program := "/usr/sbin/runc"
	if v == engines.V29 {
		bin := filepath.Join(engines.Cache(), "docker-29")
		program = filepath.Join(bin, "runc")
		n.addFile(tb, "/etc/containerd/config.toml", withoutCRI)
		for path, name := range map[string]string{
			"/usr/sbin/dockerd":                "dockerd",
			"/usr/bin/containerd":              "containerd",
			"/usr/bin/containerd-shim-runc-v2": "containerd-shim-runc-v2",
		} {
			binds += filepath.Join(bin, name) + " " + path + "\n"
		}
	}

	// no bind mount: runc starts itself through an overlay of its directory
	runc, err := os.ReadFile(program)
	if err != nil {
		tb.Fatalf("node: %v; install docker.io and run hack/docker29.sh", err)
	}

	n.addFile(tb, "/usr/sbin/runc.real", string(runc))
	engines.Build(tb, filepath.Join(n.dir, "files/usr/sbin/runc"), "cri-dockerd/test/engines/helper",
		"-X main.runc=/usr/sbin/runc.real", false)

	return binds
}
