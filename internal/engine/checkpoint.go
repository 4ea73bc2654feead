package engine

import (
	"context"
	"errors"
	"io"
	"path"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/archive"
	"cri-dockerd/internal/engine/task"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/proc"
)

// Checkpoint writes the processes of a running container into the directory images, and criu's log
// into the directory work (absolute paths). The container continues to run. Docker's own
// checkpoints need an experimental engine, so this asks the containerd shim. FailedPrecondition if
// the container does not run under it, or criu is missing.
func (e *Engine) Checkpoint(ctx context.Context, c *model.Container, images, work string) error {
	return wrap(task.Checkpoint(ctx, proc.Host(), c.Pid, string(c.ID), images, work), "checkpoint container %s", c.ID)
}

// WriteLayer writes the changes of a container's root to w, as a layer (GET
// /containers/{id}/changes and /export).
func (e *Engine) WriteLayer(ctx context.Context, id model.ContainerID, w io.Writer) (err error) {
	diff, err := e.docker().ContainerDiff(ctx, string(id), client.ContainerDiffOptions{})
	if err != nil {
		return wrap(err, "changes of container %s", id)
	}

	changes := archive.Changes{Changed: map[string]bool{}}
	for _, c := range diff.Changes {
		name := strings.TrimPrefix(path.Clean("/"+c.Path), "/")
		if c.Kind == container.ChangeDelete {
			changes.Removed = append(changes.Removed, name)
		} else {
			changes.Changed[name] = true
		}
	}

	root, err := e.docker().ContainerExport(ctx, string(id), client.ContainerExportOptions{})
	if err != nil {
		return wrap(err, "export container %s", id)
	}
	defer func() { err = errors.Join(err, root.Close()) }()

	return wrap(archive.WriteLayer(w, root, changes), "export container %s", id)
}
