package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/nri"
	"cri-dockerd/internal/validate"
)

// evictionGrace is the grace period of an evicted container, in seconds: Kubernetes' default for
// pods.
const evictionGrace = 30

// checkResources checks resources from a plugin like those of a request.
func checkResources(id model.ContainerID, r *runtimeapi.LinuxContainerResources) error {
	err := validate.Request(&runtimeapi.UpdateContainerResourcesRequest{ContainerId: string(id), Linux: r})
	if err != nil {
		return fmt.Errorf("resources of an NRI plugin: %w", err)
	}
	return nil
}

// update announces an update of a locked container, and returns the resources to set.
func (h *hooks) update(
	ctx context.Context, c *model.Container, want *runtimeapi.LinuxContainerResources,
) (_ *runtimeapi.LinuxContainerResources, more model.PluginResources, err error) {
	if h == nil {
		return want, more, nil
	}

	release, err := h.Plugins.Hold(ctx)
	if err != nil {
		return nil, more, err
	}
	defer release()

	resp, err := h.Plugins.Update(ctx, h.pod(c.SandboxID), c, want)
	if err != nil {
		return nil, more, err
	}

	var others []nri.Update
	for _, u := range resp.Updates {
		if u.ID != c.ID {
			others = append(others, u)
			continue
		}
		if u.Problem != nil {
			return nil, more, fmt.Errorf("NRI plugins: %w", u.Problem)
		}
		u.Resources.OomScoreAdj = want.GetOomScoreAdj() // NRI has no field for it
		want, more = u.Resources, u.Others
		if err := checkResources(c.ID, want); err != nil {
			return nil, more, err
		}
	}

	h.UpdateLater(others, resp.Evictions) // they need the locks of other containers

	return want, more, nil
}

// updated announces that a container was updated.
func (h *hooks) updated(ctx context.Context, c *model.Container) {
	if h == nil {
		return
	}

	release, err := h.Plugins.Hold(ctx)
	if err != nil {
		h.Log.Warn("NRI plugins do not learn of an update", "container", c.ID, "err", err)
		return
	}
	defer release()

	h.announceLate(ctx, nri.PostUpdate, h.pod(c.SandboxID), c)
}

// Update implements nri.Node. Evictions follow in the background: a stop may take its grace period.
func (h *hooks) Update(ctx context.Context, updates []nri.Update, evictions []nri.Eviction) (failed []nri.Update) {
	h.UpdateLater(nil, evictions)
	for _, u := range updates {
		err := h.updateOne(ctx, u)
		if err == nil {
			continue
		}

		h.Log.Warn("failed to update a container for an NRI plugin", "container", u.ID, "err", err)
		if !u.IgnoreFailure {
			failed = append(failed, u)
		}
	}

	return failed
}

func (h *hooks) updateOne(ctx context.Context, u nri.Update) error {
	if u.Problem != nil {
		return u.Problem
	}

	id, err := model.ParseContainerID(string(u.ID))
	if err == nil {
		err = checkResources(id, u.Resources)
	}
	if err != nil {
		return err
	}

	c, err := h.lockContainer(ctx, string(id))
	if err != nil {
		return err
	}
	defer c.unlock()

	if c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
		return fmt.Errorf("container %s has ended: %w", id, errdefs.ErrFailedPrecondition)
	}

	return LimitKeeper{h.Service}.set(ctx, c, u.Resources, u.Others, h.View.Engine().Host)
}

// UpdateLater implements nri.Node.
func (h *hooks) UpdateLater(updates []nri.Update, evictions []nri.Eviction) {
	if len(updates)+len(evictions) == 0 {
		return
	}

	h.mu.Lock()
	h.later = append(h.later, change{updates, evictions})
	h.mu.Unlock()

	select {
	case h.work <- struct{}{}:
	default: // the worker takes all changes
	}
}

// carryOut carries out later changes until ctx ends.
func (h *hooks) carryOut(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.work:
		}

		h.mu.Lock()
		changes := h.later
		h.later = nil
		h.mu.Unlock()

		for _, c := range changes {
			h.carryOutOne(ctx, c)
		}
	}
}

func (h *hooks) carryOutOne(ctx context.Context, c change) {
	ctx, cancel := context.WithTimeout(ctx, undoDeadline+2*evictionGrace*time.Second)
	defer cancel()

	for _, u := range c.updates {
		if err := h.updateOne(ctx, u); err != nil {
			h.Log.Warn("failed to update a container for an NRI plugin", "container", u.ID, "err", err)
		}
	}

	for _, e := range c.evictions {
		if _, err := model.ParseContainerID(string(e.ID)); err != nil {
			h.Log.Warn("an NRI plugin requests the eviction of an invalid container", "err", err)
			continue
		}

		h.Log.Info("evicting a container for an NRI plugin", "container", e.ID, "reason", e.Reason)
		if _, err := h.StopContainer(ctx, &runtimeapi.StopContainerRequest{
			ContainerId: string(e.ID),
			Timeout:     evictionGrace,
		}); err != nil {
			h.Log.Warn("failed to evict a container", "container", e.ID, "err", err)
		}
	}
}
