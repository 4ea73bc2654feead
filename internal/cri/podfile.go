package cri

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// writePodFile replaces the content of a pod's file in place: the engine has mounted it into all
// containers of the pod. A container may have the engine's data root as a volume and replace the
// file by anything. So writePodFile accepts only the sandbox's own file beneath the data root,
// reached without links, regular and without further hard links.
func (s *Service) writePodFile(id model.ContainerID, file string, content []byte) error {
	host, err := s.host()
	if err != nil {
		return err
	}
	return replaceContent(host.RootDir, id, file, content)
}

func replaceContent(root string, id model.ContainerID, file string, content []byte) error {
	name := filepath.Base(file)
	want := filepath.Join("containers", string(id), name)
	if rel, err := filepath.Rel(root, file); id == "" || err != nil || rel != want {
		return fmt.Errorf("%q is not the sandbox's %s beneath the engine's data root %q: %w",
			file, name, root, errdefs.ErrFailedPrecondition)
	}

	dir, err := safefs.OpenDir(root)
	if err != nil {
		return fmt.Errorf("open the engine's data root: %w", err)
	}
	defer dir.Close()

	f, err := safefs.OpenAt(dir, want, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()

	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}

	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		return fmt.Errorf("%s is not a regular file with one link: %w", file, errdefs.ErrFailedPrecondition)
	}

	_, err = f.WriteAt(content, 0)

	return errors.Join(err, f.Truncate(int64(len(content))))
}
