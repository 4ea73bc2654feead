// Package imagevolume mounts images for engines without image mounts of their own. It mounts the
// layers of an image read-only, as one overlay beneath the run directory, and containers get a bind
// mount of it. Only the kernel's mount table records the mounts. The records of containers show the
// images in use.
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

// Volumes manages the mounts beneath one directory. Only root may enter it: files of images,
// including set-user-ID programs, are for containers and not for other users of the node. The
// caller serialises calls for the same image.
type Volumes struct{ dir string }

// New returns the volumes beneath dir. The directory is created on demand.
func New(dir string) *Volumes { return &Volumes{dir: dir} }

const algorithm = "sha256:"

// path returns the mount point of an image.
func (v *Volumes) path(id model.ImageID) string { return filepath.Join(v.dir, id.Hex()) }

// Mount mounts the layers of an image, the uppermost first, by their absolute paths. It does
// nothing if the image is mounted.
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
	// Mount options are limited to one page (mount(2)). With many layers only paths of descriptors
	// are short enough.
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

	if len(lower) < 2 { // a read-only overlay requires two directories
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

// descriptor returns the path of an open descriptor.
func descriptor(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// emptyDir is not a valid name of an image.
const emptyDir = "empty"

// Unmount undoes Mount. It is idempotent. Containers keep their bind mounts.
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

// List returns the IDs of mounted images, including those of interrupted calls. It ignores other
// names.
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

// Resolve returns the host path of subPath inside a mounted image; an empty subPath is the whole
// image. The kernel resolves it with the image as the root directory, so no link leads out of it.
// It returns NotFound for a missing path, InvalidArgument for a special file, and
// FailedPrecondition if the image is not mounted.
//
// The engine resolves the returned path again, with the same result. The path has no links, and
// only root can enter the directories down to the mount point. Below it nobody can write: the mount
// is read-only, and the engine owns the layers. It never changes the layers of an image held by a
// container (Engine.HoldImage).
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
		return "", fmt.Errorf("resolve %q in image %s: the image is not mounted: %w", subPath, id, err)
	}

	path, err := resolveIn(image, subPath)
	if err != nil {
		return "", fmt.Errorf("resolve %q in image %s: %w", subPath, id, err)
	}

	return filepath.Join(v.path(id), path), nil
}

// resolveIn resolves a path with the directory image as its root, and returns it without links.
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
	case err != nil: // a loop of links, or an overlong name
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer unix.Close(fd) //nolint:errcheck // a descriptor of a path only

	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}

	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return "", fmt.Errorf("neither a file nor a directory: %w", errdefs.ErrInvalidArgument)
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
		return "", fmt.Errorf("path leads out of the image to %s: %w", path, errdefs.ErrFailedPrecondition)
	}

	return inside, nil
}

// isMount reports whether dir, a subdirectory of above, is a mount point.
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
