package cri

import (
	"context"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/nri"
)

// start announces the start of a container. An error prevents the start. Otherwise the caller must
// call end after started: the end of a short process is announced after its start.
func (h *hooks) start(ctx context.Context, c *model.Container) (end func(), err error) {
	if h == nil {
		return func() {}, nil
	}

	_, unlock, err := h.lock(ctx, c.ID)
	if err != nil {
		return nil, err
	}

	release, err := h.Plugins.Hold(ctx)
	if err == nil {
		defer release()
		err = h.Plugins.Announce(ctx, nri.Start, h.pod(c.SandboxID), c)
	}

	if err != nil {
		unlock()
		return nil, err
	}

	return unlock, nil
}

// started announces that a container has started.
func (h *hooks) started(ctx context.Context, c *model.Container) {
	if h == nil {
		return
	}

	release, err := h.Plugins.Hold(ctx)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of a start", "container", c.ID, "err", err)
		return
	}
	defer release()

	h.announceLate(ctx, nri.PostStart, h.pod(c.SandboxID), c)

	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.known[c.ID]; p != nil {
		p.started = true
	}
}

// startedLate announces that a container has started after its call had failed. It does nothing if
// plugins know of the start.
func (h *hooks) startedLate(ctx context.Context, c *model.Container) {
	if h == nil {
		return
	}

	p, unlock, err := h.lock(ctx, c.ID)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of a start", "container", c.ID, "err", err)
		return
	}
	defer unlock()

	if p != nil && !p.started && !p.stopped {
		h.started(ctx, c)
	}
}

// lock locks an object for an event that must happen once, and returns its state. It is nil if
// plugins do not know the object.
func (h *hooks) lock(ctx context.Context, id model.ContainerID) (p *plugged, unlock func(), err error) {
	unlock, err = h.names.Lock(ctx, "plugins "+string(id))
	if err != nil {
		return nil, nil, fmt.Errorf("wait for NRI plugins of %s: %w", id, err)
	}

	h.mu.Lock()
	defer h.mu.Unlock()

	return h.known[id], unlock, nil
}

// stopped announces the end of a container, once. Plugins may update other containers then. Errors
// are logged: a plugin must not keep pods from ending.
func (h *hooks) stopped(ctx context.Context, id model.ContainerID) {
	if h == nil {
		return
	}

	p, unlock, err := h.lock(ctx, id)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of an end yet", "container", id, "err", err)
		return
	}
	defer unlock()

	if p != nil && p.container != nil && !p.stopped {
		h.stopLocked(ctx, p)
	}
}

// stopLocked announces the end of a container whose lock for plugins is held.
func (h *hooks) stopLocked(ctx context.Context, p *plugged) {
	release, err := h.Plugins.Hold(ctx)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of an end yet", "container", p.container.ID, "err", err)
		return
	}
	defer release()

	c := h.current(p.container)
	resp, err := h.Plugins.Stop(ctx, h.pod(c.SandboxID), c)

	h.mu.Lock()
	p.stopped = true
	h.mu.Unlock()

	if err != nil {
		h.Log.Warn("an NRI plugin failed", "event", "StopContainer", "err", err)
		return
	}

	h.UpdateLater(resp.Updates, resp.Evictions)
}

// current returns the present record of a container, or the given one after its removal.
func (h *hooks) current(c *model.Container) *model.Container {
	if now, err := h.View.Container(string(c.ID)); err == nil {
		return now
	}
	return c
}

// removed announces the end and the removal of a container after its removal, once. Errors are
// logged: the container cannot come back.
func (h *hooks) removed(ctx context.Context, id model.ContainerID) {
	if h == nil {
		return
	}

	p, unlock, err := h.lock(ctx, id)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of a removal", "container", id, "err", err)
		return
	}
	defer unlock()

	if p == nil || p.container == nil {
		return
	}

	if !p.stopped {
		h.stopLocked(ctx, p)
	}

	h.forget(ctx, id, func() { h.announceLate(ctx, nri.Remove, h.pod(p.container.SandboxID), p.container) })
}

// forget announces the removal of an object, and forgets it.
func (h *hooks) forget(ctx context.Context, id model.ContainerID, announce func()) {
	release, err := h.Plugins.Hold(ctx)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of a removal", "id", id, "err", err)
		return
	}
	defer release()

	announce()

	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.known, id)
}

// podStopped announces the end of a pod, once. Its containers have stopped. Errors are logged.
func (h *hooks) podStopped(ctx context.Context, id model.ContainerID, containers []*model.Container) {
	if h == nil {
		return
	}

	for _, c := range containers {
		h.stopped(ctx, c.ID)
	}

	p, unlock, err := h.lock(ctx, id)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of an end yet", "sandbox", id, "err", err)
		return
	}
	defer unlock()

	if p != nil && p.sandbox != nil && !p.stopped {
		h.stopPodLocked(ctx, id, p)
	}
}

func (h *hooks) stopPodLocked(ctx context.Context, id model.ContainerID, p *plugged) {
	release, err := h.Plugins.Hold(ctx)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of an end yet", "sandbox", id, "err", err)
		return
	}
	defer release()

	h.announceLate(ctx, nri.StopPod, h.pod(id), nil)

	h.mu.Lock()
	defer h.mu.Unlock()
	p.stopped = true
}

// podRemoved announces the removal of a pod after its removal, once.
func (h *hooks) podRemoved(ctx context.Context, id model.ContainerID) {
	if h == nil {
		return
	}

	p, unlock, err := h.lock(ctx, id)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of a removal", "sandbox", id, "err", err)
		return
	}
	defer unlock()

	if p == nil || p.sandbox == nil {
		return
	}

	if !p.stopped {
		h.stopPodLocked(ctx, id, p)
	}

	h.forget(ctx, id, func() { h.announceLate(ctx, nri.RemovePod, h.pod(id), nil) })
}

// updatePod announces an update of a pod's resources.
func (h *hooks) updatePod(
	ctx context.Context, sb *model.Sandbox, overhead, resources *runtimeapi.LinuxContainerResources,
) error {
	if h == nil {
		return nil
	}

	release, err := h.Plugins.Hold(ctx)
	if err != nil {
		return err
	}
	defer release()

	return h.Plugins.UpdatePod(ctx, h.pod(sb.ID), overhead, resources)
}
