package nodes

import (
	"os"
	"path/filepath"

	"cri-dockerd/test/engines"
)

// withoutCRI is containerd's configuration without its own CRI server.
const withoutCRI = "version = 2\ndisabled_plugins = ['io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', " +
	"'io.containerd.grpc.v1.cri']\n"

// addEngine adds the programs of the engine, and a wrapper before its runc for machines without
// CAP_SYS_RESOURCE. It returns the bind mounts of the programs, one per line.
func (n *Node) addEngine(tb engines.TB, v engines.Version) (binds string) {
	tb.Helper()
	program := "/usr/sbin/runc"
	if bin := engines.Programs(tb, v); bin != "" {
		program = filepath.Join(bin, "runc")
		n.addFile(tb, "/etc/containerd/config.toml", withoutCRI)
		n.addLibraries(tb, filepath.Join(bin, "lib"))
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
		tb.Fatalf("node: %v; install docker.io", err)
	}

	n.addFile(tb, "/usr/sbin/runc.real", string(runc))
	engines.Build(tb, filepath.Join(n.dir, "files/usr/sbin/runc"), "cri-dockerd/test/engines/helper",
		"-X main.runc=/usr/sbin/runc.real", false)

	return binds
}

// addLibraries adds the C library of an engine built for a newer one than the machine's, from a
// directory that other engines lack. All programs of the node use it.
func (n *Node) addLibraries(tb engines.TB, dir string) {
	tb.Helper()
	loader, err := filepath.Glob(filepath.Join(dir, "ld-linux*"))
	if err != nil || len(loader) == 0 {
		return
	}

	libraries, err := filepath.Glob("/usr/lib/*/" + filepath.Base(loader[0]))
	if err != nil || len(libraries) != 1 {
		tb.Fatalf("node: directory of %s: %q, %v", filepath.Base(loader[0]), libraries, err)
	}

	files, err := os.ReadDir(dir)
	if err != nil {
		tb.Fatalf("node: %v", err)
	}

	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			tb.Fatalf("node: %v", err)
		}
		n.addFile(tb, filepath.Join(filepath.Dir(libraries[0]), f.Name()), string(b))
	}
}
