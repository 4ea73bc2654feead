package imagefs

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// Store describes an engine's storage of images and writable layers.
type Store struct {
	Driver string // storage driver (/info Driver)
	Root   string // data directory (/info DockerRootDir)
	// Containerd is true for containerd's image store, which has a directory of its own.
	Containerd bool
}

// layer is a directory of the store.
type layer struct {
	name      string // path beneath the layout's root
	container bool   // belongs to a container, not to an image
	final     bool   // never changes after its creation
}

// layout is a snapshot of a store's structure. The engine's data determines a container's writable
// layer, not the mounts visible to its processes.
type layout struct {
	root               *os.File // parent of the layers
	images, containers string   // the roots of their file systems
	layers             []layer
	writable           map[model.ContainerID]string // layer name by container
}

// path returns the path of a layer.
func (l *layout) path(name string) string { return filepath.Join(l.root.Name(), name) }

// close closes the layout's root.
func (l *layout) close() {
	if l.root != nil {
		_ = l.root.Close() // opened for reading only
	}
}

// Directories of Docker's graph driver overlay2, and of its metadata of containers' layers
// (layer/migration.go of Moby: <container ID>/mount-id contains the name of the layer).
const (
	overlay2Layers = "overlay2"
	overlay2Mounts = "image/overlay2/layerdb/mounts"
)

// overlay2 returns the layout of Docker's graph driver: <root>/overlay2/<id>/diff. A container's
// layer has a sibling <id>-init. The caller closes the layout, also after an error.
func overlay2(root string, known map[model.ContainerID]string) (l layout, err error) {
	l = layout{images: root, containers: root, writable: map[model.ContainerID]string{}}
	if l.root, err = safefs.OpenDir(filepath.Join(root, overlay2Layers)); err != nil {
		return l, err
	}

	entries, err := list(l.root, ".")
	if err != nil {
		return l, err
	}

	names := make(map[string]bool, len(entries))
	for _, name := range entries {
		names[name] = true
	}

	for _, name := range entries {
		if name == "l" { // short links to the others
			continue
		}

		initial, writable := strings.HasSuffix(name, "-init"), names[name+"-init"]
		l.layers = append(l.layers, layer{
			name:      filepath.Join(name, "diff"),
			container: initial || writable,
			final:     !writable,
		})
	}

	return l, l.findMounts(root, names, known)
}

// findMounts reads the writable layer of each container from Docker's metadata. known caches
// earlier results, since they never change.
func (l *layout) findMounts(root string, layers map[string]bool, known map[model.ContainerID]string) error {
	notes, err := safefs.OpenDir(filepath.Join(root, overlay2Mounts))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // no container was created yet
	}

	if err != nil {
		return err
	}
	defer notes.Close()

	containers, err := list(notes, ".")
	if err != nil {
		return err
	}

	for _, name := range containers {
		id, err := model.ParseContainerID(name)
		if err != nil {
			continue
		}

		mount, ok := known[id]
		if !ok {
			mount = mountID(notes, id)
		}

		if layers[mount] {
			l.writable[id] = filepath.Join(mount, "diff")
			known[id] = mount
		}
	}

	for id := range known {
		if l.writable[id] == "" {
			delete(known, id)
		}
	}

	return nil
}

// maxMountID limits Docker's mount-id file, with a layer name of 64 digits.
const maxMountID = 256

// mountID returns the name of a container's layer, "" if there is none.
func mountID(notes *os.File, id model.ContainerID) string {
	f, err := safefs.OpenRegular(notes, filepath.Join(string(id), "mount-id"))
	if err != nil {
		return ""
	}
	defer f.Close()

	b, err := safefs.ReadAll(f, maxMountID)
	if err != nil {
		return ""
	}

	return strings.TrimSpace(string(b))
}

const (
	snapshotter = "io.containerd.snapshotter.v1.overlayfs/snapshots"
	content     = "io.containerd.content.v1.content"
	// rootfs is the directory of Docker's mounts of containers' snapshots:
	// <root>/rootfs/overlayfs/<ID>.
	rootfs = "rootfs/overlayfs"
)

// containerd returns the layout of containerd's store: compressed blobs, and <n>/fs of the
// overlayfs snapshotter. A snapshot belongs to a container if it is an upper directory in mounts
// (in the format of /proc/self/mountinfo), or was earlier: containers caches these names. The
// caller closes the layout, also after an error.
func containerd(root string, mounts []byte, containers map[string]bool) (l layout, err error) {
	l, upper, err := containerdRoot(root, mounts)
	if err != nil {
		return l, err
	}

	for id, n := range upper {
		l.writable[id] = snapshot(n)
		containers[snapshot(n)] = true
	}

	snapshots, err := list(l.root, snapshotter)
	if err != nil {
		return l, err
	}

	found := make(map[string]bool, len(snapshots))
	for _, n := range snapshots {
		name := snapshot(n)
		found[name] = true
		l.layers = append(l.layers, layer{name: name, container: containers[name], final: !containers[name]})
	}

	for name := range containers {
		if !found[name] {
			delete(containers, name)
		}
	}

	blobs, err := list(l.root, filepath.Join(content, "blobs/sha256"))
	if err != nil {
		return l, err
	}

	for _, b := range blobs {
		l.layers = append(l.layers, layer{name: filepath.Join(content, "blobs/sha256", b), final: true})
	}

	return l, nil
}

// containerdRoot returns containerd's store and the snapshot number of each container. The layout
// has no layers yet. The caller closes it, also after an error.
func containerdRoot(root string, mounts []byte) (l layout, upper map[model.ContainerID]string, err error) {
	base, upper := upperDirs(root, mounts)
	for _, candidate := range []string{filepath.Join(root, "containerd/daemon"), "/var/lib/containerd"} {
		if _, err := os.Stat(filepath.Join(candidate, snapshotter)); base == "" && err == nil {
			base = candidate
		}
	}

	l = layout{images: base, containers: base, writable: map[model.ContainerID]string{}}
	if base == "" {
		return l, nil, &fs.PathError{Op: "find containerd's store", Path: root, Err: fs.ErrNotExist}
	}
	if l.root, err = safefs.OpenDir(base); err != nil {
		return l, nil, err
	}

	if device(l.root, content) != device(l.root, snapshotter) {
		l.images, l.containers = filepath.Join(base, content), filepath.Join(base, snapshotter)
	}

	return l, upper, nil
}

func snapshot(n string) string { return filepath.Join(snapshotter, n, "fs") }

// upperDirs returns containerd's root and the snapshot number of each container from mountinfo
// (proc_pid_mountinfo(5)). Pods may choose the names of some mounts. So it accepts only an overlay
// at Docker's mount point for the root of a container, beneath Docker's data directory.
func upperDirs(root string, mounts []byte) (base string, snapshots map[model.ContainerID]string) {
	if resolved, err := filepath.EvalSymlinks(root); err == nil { // the kernel shows the path without links
		root = resolved
	}

	snapshots = map[model.ContainerID]string{}
	all, err := mountinfo.GetMountsFromReader(bytes.NewReader(mounts), mountinfo.FSTypeFilter("overlay"))
	if err != nil {
		return "", snapshots
	}

	for _, m := range all {
		dir, name := filepath.Split(m.Mountpoint)
		id, err := model.ParseContainerID(name)
		if err != nil || filepath.Clean(dir) != filepath.Join(root, rootfs) {
			continue
		}

		for option := range strings.SplitSeq(m.VFSOptions, ",") {
			upper, ok := strings.CutPrefix(option, "upperdir=")
			if !ok {
				continue
			}
			if at, n, ok := cutSnapshot(upper); ok {
				base, snapshots[id] = at, n
			}
		}
	}

	return base, snapshots
}

// cutSnapshot splits <base>/<snapshotter>/<n>/fs.
func cutSnapshot(dir string) (base, n string, ok bool) {
	base, rest, ok := strings.Cut(dir, "/"+snapshotter+"/")
	if !ok || !filepath.IsAbs(base) || filepath.Clean(base) != base {
		return "", "", false
	}

	n, ok = strings.CutSuffix(rest, "/fs")
	if _, err := strconv.ParseUint(n, 10, 64); err != nil {
		return "", "", false
	}

	return base, n, ok
}

// list returns the names in a directory of the engine.
func list(root *os.File, name string) ([]string, error) {
	dir, err := safefs.OpenAt(root, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(-1)
}
