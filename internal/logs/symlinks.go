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
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// symlinks keeps output in Docker's json-file and links the kubelet's path to it. Users other than
// root may have write access to the kubelet's directories. So it opens them without following
// links, and changes names in them by descriptor.
type symlinks struct {
	log *slog.Logger
	// engineRoot returns the engine's data root, or "" before it is known.
	engineRoot func() string
}

// started links the log of a container after it has started or failed to start. It does nothing for
// a container without a log path or without an engine log file. It replaces an existing link.
// Anything else at the path is an error.
func (s *symlinks) started(_ context.Context, c *model.Container) error {
	if c.LogPath == "" {
		return nil
	}

	if c.EngineLogPath == "" {
		s.log.Warn("kubectl logs will not work: the engine keeps no file of the container's output",
			"container", c.Name, "driver", c.LogDriver)
		return nil
	}

	if err := s.link(c); err != nil {
		return fmt.Errorf("link log of container %s: %w", c.Name, err)
	}

	return nil
}

func (s *symlinks) link(c *model.Container) error {
	if _, err := s.checkEngineLog(c); err != nil {
		return err
	}

	dir, name, err := openLogDirectory(c.LogPath, true)
	if err != nil {
		return err
	}
	defer dir.Close()

	if target, err := readLink(dir, name); err == nil && target == c.EngineLogPath {
		return nil // replacing it would make followers of the log start again
	}

	var st unix.Stat_t
	err = unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return fmt.Errorf("%s is not a link; remove it", c.LogPath)
	}

	tmp := safefs.TemporaryName()
	if err := unix.Symlinkat(c.EngineLogPath, int(dir.Fd()), tmp); err != nil {
		return &os.LinkError{Op: "symlink", Old: c.EngineLogPath, New: filepath.Join(dir.Name(), tmp), Err: err}
	}

	return safefs.Rename(dir, tmp, name)
}

// removed removes the container's link. It ignores a missing link and another container's.
func (*symlinks) removed(_ context.Context, c *model.Container) error {
	if c.LogPath == "" || c.EngineLogPath == "" {
		return nil
	}

	dir, name, err := openLogDirectory(c.LogPath, false)
	if err != nil {
		return nil //nolint:nilerr // no directory of ours, so no link of ours
	}
	defer dir.Close()

	if target, err := readLink(dir, name); err != nil || target != c.EngineLogPath {
		return nil //nolint:nilerr // no link, or another container's
	}

	if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove log link of container %s: %w", c.Name, err)
	}

	return nil
}

// reopen emulates log rotation for a json-file (CRI ReopenContainerLog). The kubelet has renamed
// the link, but the engine keeps writing to its file and cannot be redirected. So reopen replaces
// the renamed link with a copy of the file, truncates the file, and creates a new link. Lines
// written by the engine between the last read and the truncation are lost. The caller serializes
// calls for a container.
func (s *symlinks) reopen(ctx context.Context, c *model.Container) error {
	if c.EngineLogPath == "" {
		return fmt.Errorf("reopen log of container %s: the engine's log driver %q keeps no file: %w",
			c.ID, c.LogDriver, errdefs.ErrFailedPrecondition)
	}

	if err := s.moveRenamed(c); err != nil {
		return fmt.Errorf("reopen log of container %s: %w", c.ID, err)
	}

	return s.started(ctx, c)
}

// moveRenamed moves the content of the engine's file to the most recently renamed link.
func (s *symlinks) moveRenamed(c *model.Container) error {
	dir, name, err := openLogDirectory(c.LogPath, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}

	if err != nil {
		return err
	}
	defer dir.Close()

	renamed, err := findLinks(dir, name, c.EngineLogPath)
	if err != nil || len(renamed) == 0 {
		return err
	}

	last := len(renamed) - 1
	// The others remain from aborted rotations. Only one link can receive the content.
	for _, link := range renamed[:last] {
		if err := unix.Unlinkat(int(dir.Fd()), link, 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return &os.PathError{Op: "remove", Path: filepath.Join(dir.Name(), link), Err: err}
		}
	}

	return s.moveContent(c, dir, renamed[last])
}

const (
	maxLinks = 1000 // the kubelet keeps five rotated files (containerLogMaxFiles)
	maxNames = 100_000
	namesAt  = 1000
)

// findLinks returns the links to a file whose names start with the log's name and a dot, sorted.
// It searches only the first maxNames names of a large directory.
func findLinks(dir *os.File, log, file string) (out []string, err error) {
	for seen := 0; seen < maxNames && len(out) < maxLinks; {
		names, err := dir.Readdirnames(namesAt)
		for _, name := range names {
			if suffix, ok := strings.CutPrefix(name, log+"."); !ok || suffix == "" {
				continue
			}
			if target, err := readLink(dir, name); err == nil && target == file {
				out = append(out, name)
			}
		}

		seen += len(names)
		if errors.Is(err, io.EOF) {
			break
		}

		if err != nil {
			return nil, err
		}
	}

	slices.Sort(out)

	return out, nil
}

// moveContent replaces a link to the engine's file with a copy of the file, and truncates the file.
// A crash in between duplicates lines, but loses none.
func (s *symlinks) moveContent(c *model.Container, dir *os.File, link string) error {
	from, err := s.openEngineLog(c)
	if err != nil {
		return err
	}
	defer from.Close()

	tmp := safefs.TemporaryName()
	to, err := safefs.OpenAt(dir, tmp, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	defer to.Close()

	if _, err := io.Copy(to, from); err != nil {
		return errors.Join(err, unix.Unlinkat(int(dir.Fd()), tmp, 0))
	}

	if err := safefs.Rename(dir, tmp, link); err != nil {
		return err
	}

	if _, err := io.Copy(to, from); err != nil { // lines written meanwhile
		return err
	}

	return from.Truncate(0)
}

// checkEngineLog validates the engine's path of a container's log, and returns it relative to the
// engine's data root. The file must be the container's own, <root>/containers/<ID>/<file>.
func (s *symlinks) checkEngineLog(c *model.Container) (string, error) {
	root := s.engineRoot()
	if root == "" {
		return "", fmt.Errorf("the engine's data root is not known yet: %w", errdefs.ErrUnavailable)
	}
	if _, err := model.ParseContainerID(string(c.ID)); err != nil {
		return "", err
	}

	below, ok := strings.CutPrefix(c.EngineLogPath, strings.TrimSuffix(root, "/")+"/")
	dir := filepath.Dir(below)
	own := filepath.Join("containers", string(c.ID))
	isOwn := dir == own || strings.HasSuffix(dir, "/"+own)
	if !ok || !filepath.IsLocal(below) || filepath.Clean(below) != below || !isOwn {
		return "", fmt.Errorf("the engine's log file %q is not in %s of its data root %s: %w",
			c.EngineLogPath, own, root, errdefs.ErrFailedPrecondition)
	}

	return below, nil
}

// openEngineLog opens the engine's file. No component of its path below the data root may be a
// link.
func (s *symlinks) openEngineLog(c *model.Container) (*os.File, error) {
	below, err := s.checkEngineLog(c)
	if err != nil {
		return nil, err
	}

	root, err := safefs.OpenDir(s.engineRoot())
	if err != nil {
		return nil, err
	}
	defer root.Close()

	f, err := safefs.OpenAt(root, below, unix.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}

	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1) {
		err = fmt.Errorf("%s is not a regular file with a single name: %w",
			c.EngineLogPath, errdefs.ErrFailedPrecondition)
	}

	if err != nil {
		return nil, errors.Join(err, f.Close())
	}

	return f, nil
}

// untrusted is the number of trailing directories in a log's path with possible write access for
// users other than root: the pod's log directory and the container's subdirectory (kubelet,
// BuildContainerLogsDirectory).
const untrusted = 2

// openLogDirectory opens the directory of a log and returns the log's name in it.
func openLogDirectory(log string, create bool) (dir *os.File, name string, err error) {
	if !filepath.IsAbs(log) || strings.ContainsRune(log, 0) {
		return nil, "", fmt.Errorf("log path %q is not absolute: %w", log, errdefs.ErrInvalidArgument)
	}

	above, below := filepath.Dir(filepath.Clean(log)), ""
	for range untrusted {
		if above != "/" {
			above, below = filepath.Dir(above), filepath.Join(filepath.Base(above), below)
		}
	}

	if below == "" {
		return nil, "", fmt.Errorf("log path %s is not in a directory: %w", log, errdefs.ErrInvalidArgument)
	}

	dir, err = driver.OpenBeneath(above, below, create)

	return dir, filepath.Base(log), err
}

// readLink returns the target of a link in a directory.
func readLink(dir *os.File, name string) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, b)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return string(b[:n]), nil
}
