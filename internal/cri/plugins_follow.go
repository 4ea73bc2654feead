package cri

import (
	"context"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/nri"
	"cri-dockerd/internal/view"
)

// announceWorkers is the number of containers whose end is announced at the same time.
const announceWorkers = 4

// PluginRunner runs NRI plugins.
type PluginRunner struct{ *Service }

// Run starts NRI plugins with all existing objects, and announces what happens outside of the
// calls of the CRI, until ctx ends. It does nothing without plugins. The view must be complete.
func (s PluginRunner) Run(ctx context.Context, start func(nri.Node) error) error {
	h := s.hooks
	if h == nil {
		return nil
	}

	w := s.View.Watch()
	h.fill()
	if err := start(h); err != nil {
		w.Stop()
		return err
	}

	var g errgroup.Group
	g.Go(func() error { h.carryOut(ctx); return nil })
	defer func() { _ = g.Wait() }()

	for {
		err := h.follow(ctx, w.Next)
		w.Stop()
		if ctx.Err() != nil || errdefs.IsUnavailable(err) {
			return nil
		}

		s.Log.Warn("missed the ends of containers; checking all containers for NRI plugins", "err", err)
		w = s.View.Watch()
		h.catchUp(ctx)
	}
}

// fill records all existing objects before the start of the first plugin.
func (h *hooks) fill() {
	sandboxes, containers := h.Visible.Sandboxes(), h.Visible.Containers()

	h.mu.Lock()
	defer h.mu.Unlock()

	for _, sb := range sandboxes {
		h.known[sb.ID] = &plugged{sandbox: sb, complete: true, stopped: !sb.Running}
	}
	for _, c := range containers {
		h.known[c.ID] = &plugged{
			container: c,
			complete:  true,
			started:   !c.StartedAt.IsZero(),
			stopped:   c.State == runtimeapi.ContainerState_CONTAINER_EXITED,
		}
	}
}

// Objects implements nri.Node.
func (h *hooks) Objects() []nri.Pod {
	h.mu.Lock()
	var pods []model.ContainerID
	containers := map[model.ContainerID][]*model.Container{}
	for id, p := range h.known {
		switch {
		case !p.complete:
		case p.sandbox != nil:
			pods = append(pods, id)
		default:
			containers[p.container.SandboxID] = append(containers[p.container.SandboxID], p.container)
		}
	}
	h.mu.Unlock()

	var out []nri.Pod
	for _, id := range pods {
		p := h.pod(id)
		for _, c := range containers[id] {
			p.Containers = append(p.Containers, h.current(c))
		}
		out = append(out, p)
	}

	return out
}

// follow announces ends and removals that no call has announced.
func (h *hooks) follow(ctx context.Context, next func(context.Context) (*view.Change, error)) error {
	var g errgroup.Group
	g.SetLimit(announceWorkers)
	defer func() { _ = g.Wait() }()

	for {
		change, err := next(ctx)
		if err != nil {
			return err
		}

		switch change.Type {
		case runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT:
			g.Go(func() error { h.observeStop(ctx, change.ID); return nil })
		case runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT:
			g.Go(func() error { h.observeRemoval(ctx, change.ID); return nil })
		}
	}
}

func (h *hooks) observeStop(ctx context.Context, id model.ContainerID) {
	ctx, cancel := context.WithTimeout(ctx, undoDeadline)
	defer cancel()
	h.stopped(ctx, id)
}

func (h *hooks) observeRemoval(ctx context.Context, id model.ContainerID) {
	ctx, cancel := context.WithTimeout(ctx, undoDeadline)
	defer cancel()
	h.removed(ctx, id)
	h.podRemoved(ctx, id)
}

// catchUp announces what happened while changes were missed.
func (h *hooks) catchUp(ctx context.Context) {
	h.mu.Lock()
	known := map[model.ContainerID]bool{} // true for containers
	for id, p := range h.known {
		if p.complete {
			known[id] = p.container != nil
		}
	}
	h.mu.Unlock()

	for _, sb := range h.View.Sandboxes() {
		delete(known, sb.ID)
	}

	for _, c := range h.View.Containers() {
		delete(known, c.ID)
		if c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			h.observeStop(ctx, c.ID)
		}
	}

	for id := range known {
		h.observeRemoval(ctx, id)
	}
}
