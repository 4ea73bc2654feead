// Package imagevolume mounts images for engines that cannot do so themselves: the layers of an
// image, read-only, as one overlay beneath the run directory, where containers get a bind mount of
// it. What is mounted stands in the kernel's table alone; who uses it is known from the records of
// containers.
package imagevolume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// Volumes are the mounts beneath one directory, which is root's alone: what images contain,
// set-user-ID programs included, is for containers, not for other users of the node. Calls for one
// image must not run at once.
type Volumes struct{ dir string }

// New is the volumes beneath dir, which is made when it is needed.
func New(dir string) *Volumes { return &Volumes{dir: dir} }

const algorithm = "sha256:"

// path is where an image is mounted.
func (v *Volumes) path(id model.ImageID) string { return filepath.Join(v.dir, id.Hex()) }

// Mount mounts the layers of an image, the uppermost first, by their absolute paths; nothing
// happens if it is mounted.
func (v *Volumes) Mount(id model.ImageID, layers []string) (err error) {
	root, err := v.open(true)
	if err != nil {
		return fmt.Errorf("mount image %s: %w", id, err)
	}
	defer root.Close()

	target, err := makePrivate(root, id.Hex())
	if err != nil {
		return fmt.Errorf("mount image %s: %w", id, err)
	}
	defer target.Close()

	if mounted, err := isMount(root, target); mounted || err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("mount image %s: %w", id, err), removeDir(root, id.Hex()))
		}
	}()

	return overlay(root, target, layers)
}

// overlay mounts layers at target.
func overlay(root, target *os.File, layers []string) error {
	// Options have room for one page (mount(2)), so that many layers have to be named by their
	// descriptors.
	var lower []string
	for _, l := range layers {
		if !filepath.IsAbs(l) {
			return fmt.Errorf("layer %q is not an absolute path: %w", l, errdefs.ErrInvalidArgument)
		}

		fd, err := unix.Open(l, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("layer %s: %w", l, err)
		}
		defer unix.Close(fd) //nolint:errcheck // a descriptor of a path only

		lower = append(lower, descriptor(fd))
	}

	if len(lower) < 2 { // overlayfs wants two directories where nothing is to be written
		empty, err := makePrivate(root, emptyDir)
		if err != nil {
			return err
		}
		defer empty.Close()
		lower = append(lower, descriptor(int(empty.Fd())))
	}

	const flags = unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID
	options := "lowerdir=" + strings.Join(lower, ":")

	return unix.Mount("overlay", descriptor(int(target.Fd())), "overlay", flags, options)
}

// descriptor is the path of what a descriptor stands for.
func descriptor(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// emptyDir is no image's name.
const emptyDir = "empty"

// Unmount undoes Mount. An image that is not mounted is no error. Containers keep what they have of
// it.
func (v *Volumes) Unmount(id model.ImageID) error {
	root, err := v.open(false)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}

	if err != nil {
		return fmt.Errorf("unmount image %s: %w", id, err)
	}
	defer root.Close()

	err = unix.Unmount(v.path(id), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount image %s: %w", id, err)
	}

	if err := removeDir(root, id.Hex()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unmount image %s: %w", id, err)
	}

	return nil
}

// List is the IDs of the images that are mounted, or were when a call was interrupted. Other names
// are not ours.
func (v *Volumes) List() ([]model.ImageID, error) {
	root, err := v.open(false)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}

	if err != nil {
		return nil, fmt.Errorf("list mounted images: %w", err)
	}
	defer root.Close()

	names, err := root.Readdirnames(-1)
	var ids []model.ImageID
	for _, name := range names {
		if id, err := model.ParseImageID(algorithm + name); err == nil {
			ids = append(ids, id)
		}
	}

	return ids, err
}

// Resolve returns the path on this machine of subPath inside a mounted image, "" for all of it. The
// kernel resolves it as if the image were the root directory, so that no link leads out of it.
// NotFound if it is not there, InvalidArgument if it is neither a file nor a directory,
// FailedPrecondition if the image is not mounted.
//
// The engine resolves the returned path once more. It leads to the same place then: it has no link
// in it, each of its directories down to the mount point is root's alone, and nobody writes below
// that: the mount is read-only, and the layers belong to the engine, which never changes those of
// an image that a container holds (Engine.HoldImage).
func (v *Volumes) Resolve(id model.ImageID, subPath string) (string, error) {
	root, err := v.open(false)
	if err != nil {
		return "", fmt.Errorf("resolve %q in image %s: %w", subPath, id, err)
	}
	defer root.Close()

	image, err := safefs.OpenAt(root, id.Hex(), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", fmt.Errorf("resolve %q in image %s: %w", subPath, id, err)
	}
	defer image.Close()

	if mounted, err := isMount(root, image); !mounted || err != nil {
		err = errors.Join(err, errdefs.ErrFailedPrecondition)
		return "", fmt.Errorf("resolve %q in image %s: it is not mounted: %w", subPath, id, err)
	}

	path, err := resolveIn(image, subPath)
	if err != nil {
		return "", fmt.Errorf("resolve %q in image %s: %w", subPath, id, err)
	}

	return filepath.Join(v.path(id), path), nil
}

// resolveIn resolves a path with the directory image as its root, and returns what it is without
// links.
func resolveIn(image *os.File, subPath string) (string, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}

	fd, err := safefs.Openat2(int(image.Fd()), filepath.Join(".", subPath), &how)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return "", fmt.Errorf("the image has no such path: %w", errdefs.ErrNotFound)
	case err != nil: // a loop of links, a name that is too long
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer unix.Close(fd) //nolint:errcheck // a descriptor of a path only

	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}

	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return "", fmt.Errorf("it is neither a file nor a directory: %w", errdefs.ErrInvalidArgument)
	}

	root, err := os.Readlink(descriptor(int(image.Fd())))
	if err != nil {
		return "", err
	}

	path, err := os.Readlink(descriptor(fd))
	if err != nil {
		return "", err
	}

	inside, ok := strings.CutPrefix(path, root)
	if !ok || inside != "" && inside[0] != '/' {
		return "", fmt.Errorf("it leads to %s: %w", path, errdefs.ErrFailedPrecondition)
	}

	return inside, nil
}

// isMount says whether something is mounted at dir, which lies in above.
func isMount(above, dir *os.File) (bool, error) {
	var here, there unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &here); err != nil {
		return false, err
	}

	if err := unix.Fstat(int(above.Fd()), &there); err != nil {
		return false, err
	}

	return here.Dev != there.Dev, nil
}
