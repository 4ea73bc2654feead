package podnet

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// setAsideDir holds unusable files. It lies below the cache's directory and is never read.
const setAsideDir = "set-aside"

// isOurs reports whether a name in the cache may be moved: any file, or a directory in the place of
// one of our entries.
func (*cache) isOurs(dir *os.File, name string) bool {
	_, ok := podOf(name)
	return ok || !isDirectory(dir, name)
}

// setAsideNonDirectory sets aside a file in the place of one of the cache's directories.
func (c *cache) setAsideNonDirectory(name string) error {
	dir, err := safefs.OpenDir(filepath.Join(c.dir, name))
	switch {
	case err == nil:
		return dir.Close()
	case errors.Is(err, os.ErrNotExist):
		return nil
	case errors.Is(err, unix.ENOTDIR) && !isLink(filepath.Join(c.dir, name)):
		return c.setAside(c.dir, name, err)
	}

	return fmt.Errorf("read the CNI cache: %w", err)
}

func isLink(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.Mode()&os.ModeSymlink != 0
}

func isDirectory(dir *os.File, name string) bool {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// setAside moves a file to setAsideDir and logs the reason. The pod of the file is released with
// the current configuration.
func (c *cache) setAside(dir, name string, reason error) error {
	file, target := filepath.Join(dir, name), filepath.Join(c.dir, setAsideDir, name)
	err := os.MkdirAll(filepath.Dir(target), 0o700)
	if err == nil {
		err = os.Rename(file, target)
	}

	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.ENOTDIR) ||
		errors.Is(err, unix.EISDIR) {
		// The file set aside earlier under this name is of another kind.
		err = os.RemoveAll(target)
		if err == nil {
			err = os.Rename(file, target)
		}
	}

	if err != nil {
		c.log.Error("cannot set aside an unusable file of the CNI cache",
			"file", file, "reason", boundError(reason), "err", err)
		return errors.Join(boundError(reason), err)
	}

	c.log.Warn("set aside an unusable file of the CNI cache",
		"file", file, "target", target, "reason", boundError(reason))

	c.mu.Lock()
	defer c.mu.Unlock()

	c.aside++
	c.noteLocked(name)

	return nil
}

// noteLocked records the pod of a file set aside. Records of the journal have only the ID as their
// name.
func (c *cache) noteLocked(name string) {
	if id, ok := podOf(name); ok {
		c.damaged[id] = c.damaged[id] || name != string(id)
	}
}

// podOf returns the container ID in the name of one of our cache entries or of a record.
func podOf(name string) (model.ContainerID, bool) {
	name = strings.TrimSuffix(name, "-"+ifName)
	if i := len(name) - 64; i == 0 || i > 0 && name[i-1] == '-' {
		id, err := model.ParseContainerID(name[i:])
		return id, err == nil
	}
	return "", false
}

// isDamaged reports whether a file of a pod was set aside.
func (c *cache) isDamaged(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.damaged[model.ContainerID(id)]
	return ok
}

// damagedPods returns the pods with a file set aside, also by an earlier process. The value is true
// if the pod was connected.
func (c *cache) damagedPods() map[model.ContainerID]bool {
	var names []string
	if dir, err := os.Open(filepath.Join(c.dir, setAsideDir)); err == nil {
		names, _ = dir.Readdirnames(maxCacheFiles)
		dir.Close()
	}

	c.mu.Lock()
	defer c.mu.Unlock()

	for _, name := range names {
		c.noteLocked(name)
	}

	return maps.Clone(c.damaged)
}

// forget removes the set-aside files of a pod after the release of its network.
func (c *cache) forget(id string) {
	if !c.isDamaged(id) {
		return
	}

	dir := filepath.Join(c.dir, setAsideDir)
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if of, ok := podOf(e.Name()); ok && string(of) == id {
			_ = os.RemoveAll(filepath.Join(dir, e.Name()))
		}
	}

	c.mu.Lock()
	defer c.mu.Unlock()

	delete(c.damaged, model.ContainerID(id))
}

// notice returns a message for operators about files set aside, "" if there are none.
func (c *cache) notice() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aside == 0 {
		return ""
	}
	return fmt.Sprintf("%d unusable files of the CNI cache were moved to %s; see the log for the reasons",
		c.aside, filepath.Join(c.dir, setAsideDir))
}
