// Package logs decides how a container's output reaches the path that the kubelet reads. In this release it is Docker's json-file driver
// with a symlink at the kubelet's path, as nodes with Docker have always had it.
package logs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"cri-dockerd/internal/spec"
)

// Symlinks keeps output in Docker's json-file and links the kubelet's path to it.
type Symlinks struct{ log *slog.Logger }

// NewSymlinks returns the mode.
func NewSymlinks(log *slog.Logger) *Symlinks { return &Symlinks{log: log} }

// Config is json-file without options: the engine's defaults, which its operator sets in daemon.json (max-size, max-file), hold, since the
// kubelet cannot rotate these files.
func (*Symlinks) Config(string) spec.LogConfig { return spec.LogConfig{Driver: "json-file"} }

// Started links the log of a container that has been started, or whose start failed. A container without a log path or without a file of
// the engine's has nothing to link; a link that is there already is replaced, anything else at the path is an error.
func (s *Symlinks) Started(_ context.Context, c *spec.Container) error {
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
	tmp := c.LogPath + "." + c.ID[:min(12, len(c.ID))]
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

// Removed removes the container's link. What is not there, or not this container's, is left alone.
func (*Symlinks) Removed(_ context.Context, c *spec.Container) error {
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
