// Package idmap provides the root and the mounts of a container in a user namespace. It mounts
// copies of them whose owners the kernel maps (mount_setattr(2), MOUNT_ATTR_IDMAP): files of root
// on the disk belong to root in the namespace, and the other way round. See docs/adr/0011.
package idmap

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd/v2/pkg/sys"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/annotation"
)

// stageRoot is the directory of all stages. Users of a namespace must be able to pass it, which is
// not given for the engine's data root.
const stageRoot = "/run/cri-dockerd-shim"

// Stage holds the mapped mounts of one container, until the OCI runtime has copied them into the
// container's mount namespace.
type Stage struct {
	dir    string
	users  annotation.UserNS
	userns *os.File
	n      int // of mounts
}

// rootName is the directory of the mapped root in a stage. It remains without its mount: runc
// starts the processes of an exec in this directory, before they join the container.
const rootName = "root"

// New creates a stage for a container. The caller must call Close, and Clean after the deletion of
// the container.
func New(id string, users annotation.UserNS) (*Stage, error) {
	dir, err := stageDir(id)
	if err != nil {
		return nil, err
	}

	if err := Clean(id); err != nil { // of an earlier attempt
		return nil, err
	}

	userns, err := newUserNS(users)
	if err != nil {
		return nil, fmt.Errorf("create a user namespace: %w", err)
	}

	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, errors.Join(err, userns.Close())
	}

	return &Stage{dir: dir, users: users, userns: userns}, nil
}

// Close removes the mounts of the stage. Those in other mount namespaces remain.
func (s *Stage) Close() error {
	return errors.Join(s.userns.Close(), release(s.dir, rootName))
}

func stageDir(id string) (string, error) {
	if id == "" || id == "." || id == ".." || filepath.Base(id) != id {
		return "", fmt.Errorf("%q is not the ID of a container", id)
	}
	return filepath.Join(stageRoot, id), nil
}

// Clean removes the stage of a container, if there is one.
func Clean(id string) error {
	dir, err := stageDir(id)
	if err != nil {
		return err
	}

	if err := release(dir, ""); err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}

	return nil
}

// release unmounts everything in a stage and removes the mount points but one. It only removes
// empty directories and files, never the content of a mount.
func release(dir, kept string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}

	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) { // not a mount
			errs = append(errs, fmt.Errorf("unmount %s: %w", path, err))
			continue
		}
		if e.Name() != kept {
			errs = append(errs, os.Remove(path))
		}
	}

	return errors.Join(errs...)
}

// newUserNS returns a user namespace with this mapping. The kernel takes mappings from namespaces
// alone. Equal mappings are equal to it, so this namespace need not be the container's.
func newUserNS(users annotation.UserNS) (f *os.File, err error) {
	err = sys.UnshareAfterEnterUserns(mapping(users.UIDs), mapping(users.GIDs), 0, func(pid int) (err error) {
		f, err = os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
		return err
	})
	if err != nil && f != nil {
		f.Close()
	}

	return f, err
}

// mapping returns a mapping in containerd's form.
func mapping(ids annotation.IDs) string {
	return "0:" + strconv.FormatUint(uint64(ids.First), 10) + ":" + strconv.FormatUint(uint64(ids.Size), 10)
}

// Root returns the path of the mapped root for that of the engine. The root of an engine with
// overlayfs gets an overlay of the same layers, each of them mapped. So new files have the right
// owners in the engine's layer, too. The engine's own mount stays as it is, for docker cp.
func (s *Stage) Root(root string) (string, error) {
	m, err := mountAt(root)
	if err != nil {
		return "", fmt.Errorf("root %s: %w", root, err)
	}

	if m == nil || m.FSType != "overlay" {
		return s.bind(root, rootName)
	}

	target, err := s.overlay(m, rootName)
	if err != nil {
		return "", fmt.Errorf("root %s: %w", root, err)
	}

	return target, nil
}

// mountAt returns the topmost mount at a path, nil if nothing is mounted there.
func mountAt(path string) (*mountinfo.Info, error) {
	all, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(path))
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return all[0], nil
}

// Bind returns the path of the mapped copy of a directory or file. A mounted image of an engine
// with overlayfs is such a directory.
func (s *Stage) Bind(source string) (string, error) {
	name := strconv.Itoa(s.n)
	s.n++
	m, err := mountAt(source)
	if err == nil && m != nil && m.FSType == "overlay" && isImage(m) {
		target, err := s.overlay(m, name)
		return target, wrap(err, source)
	}

	return s.bind(source, name)
}

func (s *Stage) bind(source, name string) (string, error) {
	fd, err := s.clone(source, unix.AT_RECURSIVE)
	if err != nil {
		return "", wrap(err, source)
	}
	defer unix.Close(fd)

	target, err := s.target(source, name)
	if err != nil {
		return "", err
	}

	return target, attach(fd, target)
}

func wrap(err error, path string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("map the owners of %s: %w", path, err)
}

// target creates a mount point for a directory or a file.
func (s *Stage) target(source, name string) (string, error) {
	st, err := os.Stat(source)
	if err != nil {
		return "", err
	}

	target := filepath.Join(s.dir, name)
	if st.IsDir() {
		return target, os.Mkdir(target, 0o711)
	}

	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}

	return target, f.Close()
}

// clone returns a detached mapped copy of a mount. flags are 0 or AT_RECURSIVE. File systems
// mounted below it that cannot be mapped, such as proc, keep their owners.
func (s *Stage) clone(source string, flags uint) (fd int, err error) {
	fd, err = unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|flags)
	if err != nil {
		return -1, fmt.Errorf("open_tree: %w", err)
	}

	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(s.userns.Fd())}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|flags, attr)
	if errors.Is(err, unix.EINVAL) && flags != 0 {
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, attr)
	}

	switch {
	case errors.Is(err, unix.EINVAL):
		err = fmt.Errorf("the file system does not support ID-mapped mounts on this kernel: %w", err)
	case errors.Is(err, unix.EPERM):
		err = fmt.Errorf("its owners are mapped already, or the kernel forbids it: %w", err)
	}

	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}

	return fd, nil
}

// attach mounts a detached mount at a path.
func attach(fd int, target string) error {
	err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}
