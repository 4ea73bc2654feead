package cri

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/archive"
	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// Checkpoints takes checkpoints of containers. Errors carry the same kinds as those of Engine.
type Checkpoints interface {
	// Checkpoint writes the processes of a running container into the directory images, and criu's
	// log into the directory work. FailedPrecondition if the container has no containerd shim of
	// this project, or criu is missing.
	Checkpoint(ctx context.Context, c *model.Container, images, work string) error
	// WriteLayer writes the changes of a container's root to w, as a layer.
	WriteLayer(ctx context.Context, id model.ContainerID, w io.Writer) error
}

const (
	// checkpointTimeout bounds a checkpoint without a timeout of the request.
	checkpointTimeout = 10 * time.Minute
	// maxDumpLines limits the errors of criu in a message, and maxDumpLine each of them in bytes.
	maxDumpLines = 3
	maxDumpLine  = 512
)

// checkpointing takes checkpoints of containers.
type checkpointing struct {
	*gate
	store   Checkpoints
	running *keylock.Map // a container has one checkpoint at a time
}

// CheckpointContainer writes an archive of a running container's processes, changed files and
// description (CRI CheckpointContainer). The container continues to run. The archive appears under
// its name when it is complete; a failed call leaves nothing behind.
func (s *Service) CheckpointContainer(
	ctx context.Context, r *runtimeapi.CheckpointContainerRequest,
) (*runtimeapi.CheckpointContainerResponse, error) {
	if _, err := s.host(); err != nil {
		return nil, err
	}

	timeout := checkpointTimeout
	if r.GetTimeout() > 0 {
		timeout = time.Duration(r.GetTimeout()) * time.Second
	}

	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	c, sb, err := s.checkpoints.find(r.GetContainerId())
	if err != nil {
		return nil, err
	}

	if err := s.checkpoints.take(ctx, c, sb, r.GetLocation()); err != nil {
		return nil, err
	}

	return &runtimeapi.CheckpointContainerResponse{}, nil
}

// take writes the archive of a container.
func (s *checkpointing) take(ctx context.Context, c *model.Container, sb *model.Sandbox, location string) (err error) {
	unlock, err := s.running.Lock(ctx, string(c.ID))
	if err != nil {
		return fmt.Errorf("checkpoint of container %s: another one is running: %w", c.ID, err)
	}
	defer unlock()

	parent, err := os.OpenRoot(filepath.Dir(location))
	if err != nil {
		return fmt.Errorf("location: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer parent.Close()

	work := safefs.TemporaryName()
	defer func() { err = errors.Join(err, parent.RemoveAll(work)) }()
	if err := parent.Mkdir(work, 0o700); err != nil {
		return fmt.Errorf("location: %w", err)
	}

	dir, err := parent.OpenRoot(work)
	if err != nil {
		return err
	}
	defer dir.Close()

	if err := s.dump(ctx, c, sb, dir); err != nil {
		return err
	}

	return writeArchive(ctx, parent, filepath.Base(location), dir)
}

// writeArchive packs a directory into a file of parent, which appears when it is complete.
func writeArchive(ctx context.Context, parent *os.Root, name string, dir *os.Root) (err error) {
	tmp := safefs.TemporaryName()
	f, err := parent.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("location: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("location %s: %w", name, err), parent.Remove(tmp))
		}
	}()

	err = archive.Pack(&contextWriter{ctx, f}, dir)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}

	return parent.Rename(tmp, name)
}

// find returns a running container under the containerd shim, and its sandbox.
func (s *checkpointing) find(id string) (*model.Container, *model.Sandbox, error) {
	c, err := s.runningContainer(id)
	if err != nil {
		return nil, nil, err
	}

	sb, err := s.runningSandbox(string(c.SandboxID))
	if err != nil {
		return nil, nil, err
	}

	if !sb.UsesShim() {
		return nil, nil, fmt.Errorf("checkpoint of container %s: its pod runs without the containerd shim of "+
			"cri-dockerd (--containers; see the condition ContainerdShim of the CRI's status): %w", c.ID,
			errdefs.ErrFailedPrecondition)
	}

	return c, sb, nil
}

// dump writes the files of the archive into its directory.
func (s *checkpointing) dump(ctx context.Context, c *model.Container, sb *model.Sandbox, dir *os.Root) error {
	if err := dir.Mkdir(archive.Images, 0o700); err != nil {
		return err
	}

	if err := s.store.Checkpoint(ctx, c, filepath.Join(dir.Name(), archive.Images), dir.Name()); err != nil {
		return errors.Join(err, dumpErrors(dir))
	}

	layer, err := dir.OpenFile(archive.Layer, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}

	if err := errors.Join(s.store.WriteLayer(ctx, c.ID, layer), layer.Close()); err != nil {
		return err
	}

	return archive.WriteConfig(dir, archive.Container{
		ID:             string(c.ID),
		Name:           c.Name,
		Image:          string(c.ImageID),
		ImageRef:       c.ImageRef,
		ImageName:      c.Image,
		Runtime:        sb.Runtime,
		CreatedAt:      c.CreatedAt,
		CheckpointedAt: time.Now(),
	})
}

// dumpErrors returns the first errors in criu's log, nil without any.
func dumpErrors(dir *os.Root) error {
	f, err := dir.Open(archive.Dump)
	if err != nil {
		return nil //nolint:nilerr // criu did not run
	}
	defer f.Close()

	var found []string
	for lines := bufio.NewScanner(f); lines.Scan() && len(found) < maxDumpLines; {
		if line := lines.Text(); strings.Contains(line, "Error (") {
			found = append(found, line[:min(len(line), maxDumpLine)])
		}
	}

	if found == nil {
		return nil
	}

	return fmt.Errorf("criu: %s", strings.Join(found, "; "))
}

// contextWriter fails as soon as its context ends.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (w *contextWriter) Write(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(b)
}
