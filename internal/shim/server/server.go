// Package server is the program of the shim server: the task service of a pod over TTRPC, and the
// actions of containerd that need its packages. See docs/adr/0011.
package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"cri-dockerd/internal/shim/annotation"
	"cri-dockerd/internal/shim/idmap"
	"cri-dockerd/internal/shim/sandbox"
	own "cri-dockerd/internal/shim/task"
)

// Run runs the program with the arguments of the process. It serves, deletes or describes as
// containerd asks, and exits the process on failure.
func Run(ctx context.Context) {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn:   newService,
	})
	shim.RunShim(ctx, actions{manager.NewShimManager(annotation.Runtime)})
}

// newService creates the task service of the server.
func newService(c *plugin.InitContext) (any, error) {
	p, err := c.GetByID(plugins.EventPlugin, "publisher")
	if err != nil {
		return nil, err
	}

	end, err := c.GetByID(plugins.InternalPlugin, "shutdown")
	if err != nil {
		return nil, err
	}

	publisher, ok := p.(shim.Publisher)
	sd, isShutdown := end.(shutdown.Service)
	if !ok || !isShutdown {
		return nil, fmt.Errorf("plugins of containerd's shim have the types %T and %T", p, end)
	}

	front := own.NewPublisher(publisher)
	runc, err := task.NewTaskService(c.Context, front, sd)
	if err != nil {
		return nil, err
	}

	return own.New(c.Context, runc, front), nil
}

// actions are the actions of containerd apart from serving. Those without a method here are runc's.
type actions struct{ shim.Shim }

// Start is not an action of this program: the launcher starts servers.
func (actions) Start(context.Context, *bootapi.BootstrapParams) (*bootapi.BootstrapResult, error) {
	return nil, fmt.Errorf("run containerd-shim-cri-dockerd-v1 instead: %w", errdefs.ErrNotImplemented)
}

// Stop cleans up a container after the end of its server (action "delete"). The working directory
// is the bundle.
func (a actions) Stop(ctx context.Context, id string) (shim.StopStatus, error) {
	dir, err := os.Getwd()
	if err != nil {
		return shim.StopStatus{}, err
	}

	if err := idmap.Clean(id); err != nil { // of a server that was killed while it created the container
		return shim.StopStatus{}, err
	}

	pid, exit, err := sandbox.Clean(ctx, filepath.Join(filepath.Dir(dir), id))
	if errors.Is(err, os.ErrNotExist) {
		return a.Shim.Stop(ctx, id)
	}

	return shim.StopStatus{Pid: pid, ExitStatus: exit.Code, ExitedAt: exit.At}, err
}
