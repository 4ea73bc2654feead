package imagefs

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Store says where an engine keeps images and the writable layers of containers.
type Store struct {
	Driver string // its storage driver (/info Driver)
	Root   string // its data directory (/info DockerRootDir)
	// Containerd says that containerd's image store is used, which lies in a directory of its own.
	Containerd bool
}

// layer is a directory of the store.
type layer struct {
	dir       string
	container bool // made for one container, not of an image
	final     bool // it never changes once it is made
}

// layout is what a store consists of at a moment.
type layout struct {
	images, containers string // the roots of their file systems
	layers             []layer
}

// overlay2 is the layout of Docker's graph driver: <root>/overlay2/<id>/diff. A container's layer has a sibling <id>-init.
func overlay2(root string) (layout, error) {
	base := filepath.Join(root, "overlay2")
	entries, err := os.ReadDir(base)
	if err != nil {
		return layout{}, err
	}
	names := make(map[string]bool, len(entries))
	for _, e := range entries {
		names[e.Name()] = true
	}
	l := layout{images: root, containers: root}
	for name := range names {
		if name == "l" { // short links to the others
			continue
		}
		initial, writable := strings.HasSuffix(name, "-init"), names[name+"-init"]
		l.layers = append(l.layers, layer{dir: filepath.Join(base, name, "diff"), container: initial || writable, final: !writable})
	}
	return l, nil
}

const (
	snapshotter = "io.containerd.snapshotter.v1.overlayfs/snapshots"
	content     = "io.containerd.content.v1.content"
)

// containerd is the layout of containerd's store: compressed blobs, and <n>/fs of the overlayfs snapshotter, which are those of containers
// if mounts (as in /proc/self/mountinfo) has them as an upper directory, or had: writable knows them by their directories.
func containerd(root string, mounts []byte, writable map[string]bool) (layout, error) {
	base := ""
	for s := bufio.NewScanner(bytes.NewReader(mounts)); s.Scan(); {
		if m := upperDir.FindStringSubmatch(s.Text()); m != nil {
			base = m[1]
			writable[filepath.Join(m[1], snapshotter, m[2], "fs")] = true
		}
	}
	for _, candidate := range []string{filepath.Join(root, "containerd/daemon"), "/var/lib/containerd"} {
		if _, err := os.Stat(filepath.Join(candidate, snapshotter)); base == "" && err == nil {
			base = candidate
		}
	}
	entries, err := os.ReadDir(filepath.Join(base, snapshotter))
	if err != nil {
		return layout{}, err
	}
	l := layout{images: base, containers: base}
	found := map[string]bool{}
	for _, e := range entries {
		dir := filepath.Join(base, snapshotter, e.Name(), "fs")
		found[dir] = true
		l.layers = append(l.layers, layer{dir: dir, container: writable[dir], final: !writable[dir]})
	}
	for dir := range writable {
		if !found[dir] {
			delete(writable, dir)
		}
	}
	blobs, err := os.ReadDir(filepath.Join(base, content, "blobs/sha256"))
	if err != nil {
		return layout{}, err
	}
	for _, b := range blobs {
		l.layers = append(l.layers, layer{dir: filepath.Join(base, content, "blobs/sha256", b.Name()), final: true})
	}
	if a, b := device(filepath.Join(base, content)), device(filepath.Join(base, snapshotter)); a != b {
		l.images, l.containers = filepath.Join(base, content), filepath.Join(base, snapshotter)
	}
	return l, nil
}

// upperDir finds containerd's root and the number of a container's snapshot in a line of mountinfo (proc_pid_mountinfo(5)).
var upperDir = regexp.MustCompile(`upperdir=(/[^,]*)/io\.containerd\.snapshotter\.v1\.overlayfs/snapshots/([0-9]+)/fs`)
