// Package imagevolume mounts images for engines that cannot do so themselves: the layers of an image, read-only, as one overlay beneath the
// run directory, where containers get a bind mount of it. What is mounted stands in the kernel's table alone; whoever uses it is known by
// the labels of containers.
package imagevolume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
)

// Volumes are the mounts beneath one directory. Calls for one image must not run at once.
type Volumes struct{ dir string }

// New is the volumes beneath dir, which is made when it is needed.
func New(dir string) *Volumes { return &Volumes{dir: dir} }

const algorithm = "sha256:"

func (v *Volumes) path(imageID string) string {
	return filepath.Join(v.dir, strings.TrimPrefix(imageID, algorithm))
}

// Mount mounts the layers of an image, the uppermost first; nothing happens if it is mounted.
func (v *Volumes) Mount(imageID string, layers []string) (err error) {
	target := v.path(imageID)
	if err := os.MkdirAll(target, 0o755); err != nil {
		return fmt.Errorf("mount image %s: %w", imageID, err)
	}
	if mounted, err := isMount(target); mounted || err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("mount image %s: %w", imageID, err), os.Remove(target))
		}
	}()
	if len(layers) < 2 { // overlayfs wants two directories where nothing is to be written
		empty := filepath.Join(v.dir, emptyDir)
		if err := os.MkdirAll(empty, 0o755); err != nil {
			return err
		}
		layers = append(layers[:len(layers):len(layers)], empty)
	}
	// Options have room for one page (mount(2)), so that many layers have to be named by their descriptors.
	var lower []string
	for _, l := range layers {
		fd, err := unix.Open(l, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("layer %s: %w", l, err)
		}
		defer unix.Close(fd) //nolint:errcheck // a descriptor of a path only
		lower = append(lower, fmt.Sprintf("/proc/self/fd/%d", fd))
	}
	return unix.Mount("overlay", target, "overlay", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, "lowerdir="+strings.Join(lower, ":"))
}

// emptyDir is no image's name.
const emptyDir = "empty"

// Unmount undoes Mount. An image that is not mounted is no error. Containers keep what they have of it.
func (v *Volumes) Unmount(imageID string) error {
	target := v.path(imageID)
	if err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount image %s: %w", imageID, err)
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unmount image %s: %w", imageID, err)
	}
	return nil
}

// List is the IDs of the images that are mounted, or were when a call was interrupted.
func (v *Volumes) List() ([]string, error) {
	entries, err := os.ReadDir(v.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var ids []string
	for _, e := range entries {
		if e.Name() != emptyDir {
			ids = append(ids, algorithm+e.Name())
		}
	}
	return ids, err
}

// Resolve is where a path inside a mounted image is on this machine, links followed inside the image. NotFound if it is not there.
func (v *Volumes) Resolve(imageID, subPath string) (string, error) {
	root := v.path(imageID)
	file, err := securejoin.SecureJoin(root, subPath)
	if err == nil {
		_, err = os.Lstat(file)
	}
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return "", fmt.Errorf("image %s has no %s: %w", imageID, subPath, errdefs.ErrNotFound)
	}
	return file, err
}

// isMount says whether something is mounted at a directory, by comparing it with the one above.
func isMount(dir string) (bool, error) {
	var here, above unix.Stat_t
	if err := unix.Stat(dir, &here); err != nil {
		return false, err
	}
	if err := unix.Stat(filepath.Dir(dir), &above); err != nil {
		return false, err
	}
	return here.Dev != above.Dev, nil
}
