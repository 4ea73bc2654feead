package logs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/spec"
)

// symlinks keeps output in Docker's json-file and links the kubelet's path to it.
type symlinks struct{ log *slog.Logger }

// started links the log of a container that has been started, or whose start failed. A container without a log path or without a file of
// the engine's has nothing to link; a link that is there already is replaced, anything else at the path is an error.
func (s *symlinks) started(_ context.Context, c *spec.Container) error {
	if c.LogPath == "" {
		return nil
	}
	if c.EngineLogPath == "" {
		s.log.Warn("kubectl logs will not work: the engine keeps no file of the container's output", "container", c.Name, "driver", c.LogDriver)
		return nil
	}
	if st, err := os.Lstat(c.LogPath); err == nil && st.Mode()&os.ModeSymlink == 0 {
		return fmt.Errorf("link log of container %s: %s is in the way", c.Name, c.LogPath)
	}
	if err := os.MkdirAll(filepath.Dir(c.LogPath), 0o755); err != nil {
		return fmt.Errorf("link log of container %s: %w", c.Name, err)
	}
	tmp := c.LogPath + "." + string(c.ID[:min(12, len(c.ID))])
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("link log of container %s: %w", c.Name, err)
	}
	if err := os.Symlink(c.EngineLogPath, tmp); err != nil {
		return fmt.Errorf("link log of container %s: %w", c.Name, err)
	}
	if err := os.Rename(tmp, c.LogPath); err != nil {
		return errors.Join(fmt.Errorf("link log of container %s: %w", c.Name, err), os.Remove(tmp))
	}
	return nil
}

// removed removes the container's link. What is not there, or not this container's, is left alone.
func (*symlinks) removed(_ context.Context, c *spec.Container) error {
	if c.LogPath == "" || c.EngineLogPath == "" {
		return nil
	}
	target, err := os.Readlink(c.LogPath)
	if err != nil || target != c.EngineLogPath {
		return nil //nolint:nilerr // no link, or another container's
	}
	if err := os.Remove(c.LogPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove log link of container %s: %w", c.Name, err)
	}
	return nil
}

// reopen makes the kubelet's rotation of a json-file come true (CRI ReopenContainerLog). The kubelet has renamed the link; the engine goes
// on writing its file, which nobody can make it change. So the renamed link becomes a copy of the file, the file is emptied, and a new link
// is made. Lines that the engine writes in the moment between the last look and the emptying are lost. The caller keeps other calls for
// this container away.
func (s *symlinks) reopen(ctx context.Context, c *spec.Container) error {
	if c.EngineLogPath == "" {
		return fmt.Errorf("reopen log of container %s: the engine's log driver %q keeps no file: %w", c.ID, c.LogDriver, errdefs.ErrFailedPrecondition)
	}
	renamed, err := linksBeside(c.LogPath, c.EngineLogPath)
	if err != nil {
		return fmt.Errorf("reopen log of container %s: %w", c.ID, err)
	}
	for i, link := range renamed {
		if i < len(renamed)-1 { // left by rotations that were given up; only one can have the text
			err = os.Remove(link)
		} else {
			err = moveText(c, link)
		}
		if err != nil {
			return fmt.Errorf("reopen log of container %s: %w", c.ID, err)
		}
	}
	return s.started(ctx, c)
}

// linksBeside are the links to a file whose names begin with the log's and a dot, in the order of names.
func linksBeside(log, file string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(log))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var out []string
	for _, e := range entries {
		name := filepath.Join(filepath.Dir(log), e.Name())
		if len(name) <= len(log)+1 || name[:len(log)+1] != log+"." || e.Type() != os.ModeSymlink {
			continue
		}
		if target, err := os.Readlink(name); err == nil && target == file {
			out = append(out, name)
		}
	}
	return out, err
}

// moveText puts a copy of the engine's file in the place of a link to it, and empties the file. A crash between leaves lines twice, none
// lost.
func moveText(c *spec.Container, link string) error {
	from, err := os.OpenFile(c.EngineLogPath, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	// The name does not begin with the log's, so the kubelet does not count it.
	tmp := filepath.Join(filepath.Dir(link), "."+filepath.Base(c.LogPath)+"."+string(c.ID[:min(12, len(c.ID))]))
	to, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	defer to.Close()
	_, err = io.Copy(to, from)
	if err == nil {
		err = os.Rename(tmp, link)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if _, err := io.Copy(to, from); err != nil { // what came meanwhile
		return err
	}
	return from.Truncate(0)
}
