package imagevolume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/safefs"
)

// private is the mode of directories accessible only to root.
const private = 0o700

// open opens the directory of all volumes and ensures that only root can enter it. With create it
// creates a missing directory.
func (v *Volumes) open(create bool) (*os.File, error) {
	parent, name := filepath.Split(v.dir)
	if create {
		if err := os.MkdirAll(parent, 0o755); err != nil {
			return nil, err
		}
	}

	above, err := safefs.OpenDir(parent)
	if err != nil {
		return nil, err
	}
	defer above.Close()

	if create {
		return makePrivate(above, name)
	}

	return openPrivate(above, name)
}

// makePrivate opens a directory accessible only to root. It creates a missing one.
func makePrivate(above *os.File, name string) (*os.File, error) {
	if err := unix.Mkdirat(int(above.Fd()), name, private); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: "mkdir", Path: filepath.Join(above.Name(), name), Err: err}
	}
	return openPrivate(above, name)
}

// openPrivate opens a directory and restricts it to root, since older versions did not. It leaves a
// mount point unchanged. It returns FailedPrecondition if the path is not a directory or belongs to
// another user, since that user could replace its content.
func openPrivate(above *os.File, name string) (*os.File, error) {
	path := filepath.Join(above.Name(), name)
	dir, err := safefs.OpenAt(above, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("%s is not a directory; remove it: %w", path, errdefs.ErrFailedPrecondition)
	}

	if err != nil {
		return nil, err
	}

	if err := closeToOthers(above, dir); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), dir.Close())
	}

	return dir, nil
}

func closeToOthers(above, dir *os.File) error {
	if mounted, err := isMount(above, dir); mounted || err != nil {
		return err
	}

	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}

	if int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("directory belongs to user %d; remove it: %w", st.Uid, errdefs.ErrFailedPrecondition)
	}
	if st.Mode&0o7777 == private {
		return nil
	}

	return dir.Chmod(private)
}

// removeDir removes an empty directory.
func removeDir(above *os.File, name string) error {
	if err := unix.Unlinkat(int(above.Fd()), name, unix.AT_REMOVEDIR); err != nil {
		return &os.PathError{Op: "rmdir", Path: filepath.Join(above.Name(), name), Err: err}
	}
	return nil
}
