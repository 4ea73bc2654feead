package engines

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// hostDirs are the parents of the directories that a node has for itself.
const hostDirs = "/etc /root /var/lib /var/log"

// onHost runs setup.sh on a host with empty directories and one mount in /etc. It prints the files
// on the host after the node has ended.
const onHost = `set -e
	for d in ` + hostDirs + `; do mount -t tmpfs -o mode=755 tmpfs $d; done
	touch /etc/resolv.conf
	mount --bind "$1/resolv.conf" /etc/resolv.conf
	unshare -m -n -p --fork --mount-proc --propagation private sh "$1/setup.sh" "$1" "$1/program"
	find ` + hostDirs + ` -mindepth 1`

// inNode is process 1 of the node. It writes to all directories with files of the node.
const inNode = `#!/bin/sh -e
	grep -q 192.0.2.53 /etc/resolv.conf
	for d in /etc /etc/cni /etc/docker /var/lib /var/lib/cni /var/lib/dockershim /var/lib/kubelet /var/log \
		/var/log/pods /var/log/containers; do
		echo node > $d/file
	done
	mkdir -p /etc/kubernetes /var/lib/cri-dockerd
`

// TestNothingRemainsOnTheHost starts a node, which must not leave a file or a mount point in the
// directories of the host.
func TestNothingRemainsOnTheHost(t *testing.T) {
	dir := t.TempDir()
	WriteProgram(t, filepath.Join(dir, "setup.sh"), setup)
	WriteProgram(t, filepath.Join(dir, "program"), inNode)
	if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte("nameserver 192.0.2.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", onHost, "sh", dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("set up a node: %v\n%s", err, out)
	}
	if got := strings.TrimSpace(string(out)); got != "/etc/resolv.conf" {
		t.Errorf("files on the host: got %q, want only resolv.conf", got)
	}

	for _, d := range []string{"etc/cni", "etc/docker", "var/lib/cni", "var/lib/kubelet", "var/log", "var/log/pods"} {
		if b, err := os.ReadFile(filepath.Join(dir, "root", d, "file")); string(b) != "node\n" {
			t.Errorf("file of the node in %s: got %q, %v", d, b, err)
		}
	}
}
