package cri

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/nri"
	"cri-dockerd/internal/translate"
	"cri-dockerd/internal/validate"
)

// Plugins relays events to NRI plugins; see nri.Runtime.
type Plugins interface {
	// Hold delays the registration of plugins until release.
	Hold(ctx context.Context) (release func(), err error)
	// Announce relays an event of a pod, or of its container c.
	Announce(ctx context.Context, e nri.Event, p nri.Pod, c *model.Container) error
	UpdatePod(ctx context.Context, p nri.Pod, overhead, resources *runtimeapi.LinuxContainerResources) error
	Create(ctx context.Context, p nri.Pod, c *model.Container) (*nri.Response, error)
	Update(
		ctx context.Context, p nri.Pod, c *model.Container, want *runtimeapi.LinuxContainerResources,
	) (*nri.Response, error)
	Stop(ctx context.Context, p nri.Pod, c *model.Container) (*nri.Response, error)
	State() nri.State
}

// PluginStore records the objects whose plugins have completed; see nri.Store. It exists without
// plugins, too: a former daemon may have had some.
type PluginStore interface {
	Complete(id model.ContainerID, a *nri.Adjustment) error
	Adjustment(id model.ContainerID) (*nri.Adjustment, error)
	Forget(id model.ContainerID) error
	IDs() []model.ContainerID
}

// Concealer hides objects from the users of the CRI until their plugins have completed; see
// view.Conceal.
type Concealer interface {
	Reveal(id model.ContainerID)
	IsConcealed(id model.ContainerID) bool
}

// Visible has the objects that users of the CRI see; see view.Visible. The lists are shared: read
// only.
type Visible interface {
	Sandbox(id string) (*model.Sandbox, error)
	Container(id string) (*model.Container, error)
	Sandboxes() []*model.Sandbox
	Containers() []*model.Container
}

// hooks announces the lifecycle of pods and containers to NRI plugins: each event once, and in the
// order of NRI's documentation. A nil hooks does nothing.
//
// Locks: a caller may hold the locks of its pod or container. An event takes the lock of its object
// for plugins, and then Plugins.Hold. Nothing waits for a lock under Hold.
type hooks struct {
	*Service

	mu    sync.Mutex // guards known and later
	known map[model.ContainerID]*plugged
	later []change
	work  chan struct{} // one element if later may have changes
}

// plugged is an object that plugins know or will know.
type plugged struct {
	// The last record: events follow the removal of an object.
	sandbox   *model.Sandbox
	container *model.Container
	complete  bool // for Synchronize; set under Hold
	started   bool // plugins know that it has started; for containers
	stopped   bool // plugins know that it has stopped
}

// change is what a plugin requests beside its response to an event.
type change struct {
	updates   []nri.Update
	evictions []nri.Eviction
}

func newHooks(s *Service) *hooks {
	if s.Plugins == nil {
		return nil
	}
	return &hooks{Service: s, known: map[model.ContainerID]*plugged{}, work: make(chan struct{}, 1)}
}

// pod returns a pod for plugins. Without a record it has only its ID.
func (h *hooks) pod(id model.ContainerID) nri.Pod {
	sb, err := h.View.Sandbox(string(id))
	if err != nil {
		sb = h.lastSandbox(id)
	}

	p := nri.Pod{Sandbox: sb, Host: nri.Host{UsesSystemd: h.View.Engine().Host.CgroupDriver == "systemd"}}
	for _, ip := range h.Network.Addresses(sb) {
		p.IPs = append(p.IPs, ip.String())
	}

	return p
}

func (h *hooks) lastSandbox(id model.ContainerID) *model.Sandbox {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.known[id]; p != nil && p.sandbox != nil {
		return p.sandbox
	}
	return &model.Sandbox{ID: id}
}

// add records an object that is announced next.
func (h *hooks) add(id model.ContainerID, p *plugged) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.known[id] = p
}

// runPod announces a new pod and makes it visible. On error the caller removes the pod, which
// announces that, too.
func (h *hooks) runPod(ctx context.Context, id model.ContainerID) error {
	if h == nil {
		return nil
	}

	release, err := h.Plugins.Hold(ctx)
	if err != nil {
		return err
	}
	defer release()

	p := h.pod(id)
	h.add(id, &plugged{sandbox: p.Sandbox})
	if err := h.Plugins.Announce(ctx, nri.RunPod, p, nil); err != nil {
		return err
	}

	return h.complete(id, nil)
}

// complete makes an object visible. The caller holds Plugins.Hold.
func (h *hooks) complete(id model.ContainerID, a *nri.Adjustment) error {
	if err := h.PluginStore.Complete(id, a); err != nil {
		return err
	}

	h.mu.Lock()
	if p := h.known[id]; p != nil {
		p.complete = true
	}
	h.mu.Unlock()
	h.Concealer.Reveal(id)

	return nil
}

// create announces a container, applies the adjustments of plugins, and makes the container
// visible. Updates of other containers follow. On error the caller removes the container, which
// announces that, too.
func (h *hooks) create(ctx context.Context, id model.ContainerID) error {
	if h == nil {
		return nil
	}

	c, err := h.View.Container(string(id))
	if err != nil {
		return err
	}

	resp, err := h.adjust(ctx, c)
	if err != nil {
		return err
	}

	if failed := h.Update(ctx, resp.Updates, resp.Evictions); len(failed) > 0 {
		h.Log.Warn("NRI plugins could not update other containers", "container", c.ID, "failed", len(failed))
	}

	return nil
}

func (h *hooks) adjust(ctx context.Context, c *model.Container) (*nri.Response, error) {
	release, err := h.Plugins.Hold(ctx)
	if err != nil {
		return nil, err
	}
	defer release()

	p := h.pod(c.SandboxID)
	h.add(c.ID, &plugged{container: c})
	resp, err := h.Plugins.Create(ctx, p, c)
	if err != nil {
		return nil, err
	}

	if err := h.apply(ctx, c, resp.Adjustment); err != nil {
		return nil, fmt.Errorf("adjustments of NRI plugins: %w", err)
	}

	h.announceLate(ctx, nri.PostCreate, p, c)

	return resp, h.complete(c.ID, resp.Adjustment)
}

// announceLate announces an event that plugins cannot prevent any more. It logs errors.
func (h *hooks) announceLate(ctx context.Context, e nri.Event, p nri.Pod, c *model.Container) {
	if err := h.Plugins.Announce(ctx, e, p, c); err != nil {
		h.Log.Warn("an NRI plugin failed", "event", e, "err", err)
	}
}

// apply carries out the adjustments that Docker's API can express. The shim carries out all of
// them, at the start.
func (h *hooks) apply(ctx context.Context, c *model.Container, a *nri.Adjustment) error {
	if only := a.NeedsShim(); len(only) > 0 && c.Plugged.Directory == "" {
		return fmt.Errorf("%s: Docker's API cannot express it; the pod must run under the containerd shim "+
			"(--containers=auto or shim): %w", strings.Join(only, ", "), errdefs.ErrFailedPrecondition)
	}

	r, others := a.Resources(), a.PluginResources()
	if r == nil {
		return nil
	}
	if c.Plugged.Directory != "" {
		others = model.PluginResources{} // the shim sets them; Docker has a minimum for reservations
	}

	if err := h.applyResources(ctx, c, r, others); err != nil {
		return fmt.Errorf("%s: %w", a.DescribeResources(), err)
	}

	return nil
}

func (h *hooks) applyResources(
	ctx context.Context, c *model.Container, r *runtimeapi.LinuxContainerResources, others model.PluginResources,
) error {
	if err := checkResources(c.ID, r); err != nil {
		return err
	}

	host := h.View.Engine().Host
	if err := validate.Update(r, host); err != nil {
		return err
	}

	update, err := translate.NewUpdate(r, host)
	if err != nil {
		return err
	}
	update.Add(others)

	return errors.Join(h.Engine.Update(ctx, c.ID, update), h.View.Refresh(ctx, c.ID))
}
