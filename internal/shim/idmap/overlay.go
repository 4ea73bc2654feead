package idmap

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/thread"
)

// overlayfs itself cannot be mapped, but its layers can (Linux 5.19). So an overlay is built again
// from mapped copies of its layers.

const (
	// maxLayers is overlayfs's limit of lower layers (OVL_MAX_STACK).
	maxLayers = 500
	// workDir is the work directory of the mapped overlay, beside the upper layer: the engine's own
	// mount uses the other one. The engine removes it with the layer.
	workDir = "cri-dockerd-work"
)

// keptOptions are the options that a mapped overlay takes from the engine's.
var keptOptions = []string{"index=", "userxattr", "volatile", "metacopy=", "redirect_dir=", "nfs_export=", "xino="}

// layers are the directories of an overlay, as absolute paths.
type layers struct {
	lower   []string // first the topmost
	upper   string   // "" for a read-only overlay
	work    string   // beside upper
	options []string
}

// isImage reports whether an overlay has no layer for changes, as a mounted image.
func isImage(m *mountinfo.Info) bool { return !strings.Contains(","+m.VFSOptions, ",upperdir=") }

// parseLayers returns the layers of a mounted overlay. Engines mount with paths relative to their
// directory of layers if the options would exceed a page.
func parseLayers(m *mountinfo.Info) (layers, error) {
	var l layers
	if strings.Contains(m.VFSOptions, "\\") { // an escaped character
		return l, fmt.Errorf("the overlay's options have special characters: %s", m.VFSOptions)
	}

	for option := range strings.SplitSeq(m.VFSOptions, ",") {
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "lowerdir":
			l.lower = append(l.lower, strings.Split(value, ":")...)
		case "lowerdir+":
			l.lower = append(l.lower, value)
		case "datadir+":
			return l, errors.New("the overlay has a data layer")
		case "upperdir":
			l.upper = value
		case "workdir":
			l.work = value
		}

		for _, kept := range keptOptions {
			if option == kept || strings.HasSuffix(kept, "=") && strings.HasPrefix(option, kept) {
				l.options = append(l.options, option)
			}
		}
	}

	if err := l.makeAbsolute(filepath.Dir(filepath.Dir(m.Mountpoint))); err != nil {
		return l, err
	}

	switch {
	case len(l.lower) == 0 || len(l.lower) > maxLayers:
		return l, fmt.Errorf("the overlay has %d layers", len(l.lower))
	case path.Dir(l.upper) != path.Dir(l.work):
		return l, fmt.Errorf("upper layer %s and work directory %s have different parents", l.upper, l.work)
	}

	return l, nil
}

// makeAbsolute makes the paths absolute. mounts is the directory above that of the mount.
func (l *layers) makeAbsolute(mounts string) error {
	bases := []string{mounts} // the graph driver overlay2
	if path.IsAbs(l.upper) {  // containerd's snapshotter
		bases = append(bases, path.Dir(path.Dir(l.upper)))
	}

	all := []*string{&l.upper, &l.work}
	for i := range l.lower {
		all = append(all, &l.lower[i])
	}

	for _, p := range all {
		if *p == "" || path.IsAbs(*p) {
			continue
		}

		found := false
		for _, base := range bases {
			if _, err := os.Stat(path.Join(base, *p)); err == nil && !found {
				*p, found = path.Join(base, *p), true
			}
		}
		if !found {
			return fmt.Errorf("layer %q is not an absolute path", *p)
		}
	}

	return nil
}

// overlay mounts a mapped copy of an overlay and returns its path.
func (s *Stage) overlay(m *mountinfo.Info, name string) (string, error) {
	l, err := parseLayers(m)
	if err != nil {
		return "", err
	}

	target, err := s.target(m.Mountpoint, name)
	if err != nil {
		return "", err
	}

	if l.upper != "" {
		work := path.Join(path.Dir(l.upper), workDir)
		if err := os.Mkdir(work, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return "", err
		}
	}

	// The mapped layers are mounted in a mount namespace that ends with its thread. The overlay
	// keeps copies of its own.
	var fd int
	thread.Run(func() { fd, err = s.build(l, target) })
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)

	return target, attach(fd, target)
}

// Refresh makes the kernel drop the cached directory entries of the engine's mount of a root.
// Otherwise the engine does not see changes through the mapped root in directories that it has
// opened before. A reconfiguration without a change drops them (Linux, reconfigure_super).
func Refresh(root string) error {
	m, err := mountAt(root)
	if err != nil || m == nil || m.FSType != "overlay" {
		return err
	}

	fd, err := unix.Fspick(unix.AT_FDCWD, root, unix.FSPICK_CLOEXEC|unix.FSPICK_SYMLINK_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("fspick %s: %w", root, err)
	}
	defer unix.Close(fd)

	if err := unix.FsconfigReconfigure(fd); err != nil {
		return fmt.Errorf("reconfigure %s: %w", root, err)
	}

	return nil
}

// build mounts a mapped overlay on the calling thread in a mount namespace of its own. It returns
// the overlay as a detached mount. dir is an empty directory.
func (s *Stage) build(l layers, dir string) (fd int, err error) {
	for _, step := range []func() error{
		func() error { return unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS) },
		func() error { return unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, "") },
		func() error { return unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=700") },
		func() error { return unix.Chdir(dir) },
		func() error { return unix.Mkdir("merged", 0o700) },
	} {
		if err := step(); err != nil {
			return -1, fmt.Errorf("prepare the layers: %w", err)
		}
	}

	names := make([]string, len(l.lower))
	for i, layer := range l.lower {
		names[i] = strconv.Itoa(i)
		if err := s.mountLayer(layer, names[i]); err != nil {
			return -1, err
		}
	}

	options := append([]string{"lowerdir=" + strings.Join(names, ":")}, l.options...)
	if l.upper != "" {
		// The kernel requires both directories in one mount.
		if err := s.mountLayer(path.Dir(l.upper), "upper"); err != nil {
			return -1, err
		}
		options = append(options, "upperdir=upper/"+path.Base(l.upper), "workdir=upper/"+workDir)
	}

	if err := s.becomeRoot(); err != nil {
		return -1, err
	}

	if err := unix.Mount("overlay", "merged", "overlay", 0, strings.Join(options, ",")); err != nil {
		return -1, fmt.Errorf("mount an overlay of mapped layers: %w", err)
	}

	fd, err = unix.OpenTree(unix.AT_FDCWD, "merged", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open_tree: %w", err)
	}

	return fd, nil
}

// mountLayer mounts a mapped copy of a layer.
func (s *Stage) mountLayer(layer, name string) error {
	fd, err := s.clone(layer, 0)
	if err != nil {
		return fmt.Errorf("layer %s: %w", layer, err)
	}
	defer unix.Close(fd)

	if err := unix.Mkdir(name, 0o700); err != nil {
		return err
	}

	return attach(fd, name)
}

// becomeRoot makes the calling thread act on files as root of the user namespace, with all
// capabilities of this process. overlayfs creates files as the process that mounted it, and the
// node's root has no ID in a mapped layer.
func (s *Stage) becomeRoot() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}

	for _, call := range []struct{ number, id uintptr }{
		{unix.SYS_SETFSGID, uintptr(s.users.GIDs.First)},
		{unix.SYS_SETFSUID, uintptr(s.users.UIDs.First)}, // drops capabilities (capabilities(7))
	} {
		_, _, _ = unix.RawSyscall(call.number, call.id, 0, 0) // returns the previous ID, also on failure
		if now, _, _ := unix.RawSyscall(call.number, ^uintptr(0), 0, 0); now != call.id {
			return fmt.Errorf("the thread cannot become user %d", call.id)
		}
	}

	if err := unix.Capset(&header, &caps[0]); err != nil {
		return fmt.Errorf("restore capabilities: %w", err)
	}

	return nil
}
