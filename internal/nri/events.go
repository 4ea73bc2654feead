package nri

import (
	"context"
	"fmt"

	"github.com/containerd/nri/pkg/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// Pod is a pod as plugins see it.
type Pod struct {
	*model.Sandbox
	IPs        []string
	Containers []*model.Container // for Synchronize only
	Host       Host
}

// Host are the properties of the node that determine the control groups of containers.
type Host struct {
	UsesSystemd bool // Docker's cgroup driver
}

// Event is an event without a response.
type Event string

// The events of NRI without a response.
const (
	RunPod     Event = "RunPodSandbox"
	StopPod    Event = "StopPodSandbox"
	RemovePod  Event = "RemovePodSandbox"
	PostUpdate Event = "PostUpdateContainer"
	PostCreate Event = "PostCreateContainer"
	Start      Event = "StartContainer"
	PostStart  Event = "PostStartContainer"
	Remove     Event = "RemoveContainer"

	postUpdatePod = "PostUpdatePodSandbox"
	updatePod     = "UpdatePodSandbox"
	create        = "CreateContainer"
	updateOne     = "UpdateContainer"
	stop          = "StopContainer"
)

// Announce relays an event to plugins. c is nil for an event of a pod. The error is
// FailedPrecondition if a plugin rejects the event, or ctx's.
func (r *Runtime) Announce(ctx context.Context, e Event, p Pod, c *model.Container) error {
	id, pod := p.ID, toPod(p)
	var container *api.Container
	if c != nil {
		id, container = c.ID, toContainer(p, c)
	}

	var err error
	switch e {
	case RunPod:
		err = r.adaptation.RunPodSandbox(ctx, &api.RunPodSandboxRequest{Pod: pod})
	case StopPod:
		err = r.adaptation.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: pod})
	case RemovePod:
		err = r.adaptation.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: pod})
	case PostCreate:
		err = r.adaptation.PostCreateContainer(ctx, &api.PostCreateContainerRequest{Pod: pod, Container: container})
	case Start:
		err = r.adaptation.StartContainer(ctx, &api.StartContainerRequest{Pod: pod, Container: container})
	case PostStart:
		err = r.adaptation.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: pod, Container: container})
	case PostUpdate:
		err = r.adaptation.PostUpdateContainer(ctx, &api.PostUpdateContainerRequest{Pod: pod, Container: container})
	case Remove:
		err = r.adaptation.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: pod, Container: container})
	default:
		err = fmt.Errorf("unknown event %s", e)
	}

	return fail(ctx, string(e), id, err)
}

// UpdatePod relays an update of a pod's resources (UpdatePodSandbox, then PostUpdatePodSandbox).
func (r *Runtime) UpdatePod(
	ctx context.Context, p Pod, overhead, resources *runtimeapi.LinuxContainerResources,
) error {
	if _, err := r.adaptation.UpdatePodSandbox(ctx, &api.UpdatePodSandboxRequest{
		Pod:                    toPod(p),
		OverheadLinuxResources: toResources(overhead),
		LinuxResources:         toResources(resources),
	}); err != nil {
		return fail(ctx, updatePod, p.ID, err)
	}

	return fail(ctx, postUpdatePod, p.ID,
		r.adaptation.PostUpdatePodSandbox(ctx, &api.PostUpdatePodSandboxRequest{Pod: toPod(p)}))
}

// Response is the response of plugins to the event of a container.
type Response struct {
	Adjustment *Adjustment // of a new container, else nil
	Updates    []Update
	Evictions  []Eviction
}

// Create relays the creation of a container, and returns its adjustments and the updates of other
// containers. The plugins' adjustments may conflict, or a plugin may reject them:
// FailedPrecondition.
func (r *Runtime) Create(ctx context.Context, p Pod, c *model.Container) (*Response, error) {
	ctx, evictions := withEvictions(ctx)
	ctx, owners := withOwners(ctx)
	resp, err := r.adaptation.CreateContainer(ctx, &api.CreateContainerRequest{
		Pod:       toPod(p),
		Container: toContainer(p, c),
	})
	if err != nil {
		return nil, fail(ctx, create, c.ID, err)
	}

	a, err := newAdjustment(resp.GetAdjust(), owners, r.classes)
	if err != nil {
		return nil, fail(ctx, create, c.ID, err)
	}

	updates, err := evictions.complete(resp.GetUpdate())
	if err != nil {
		return nil, fail(ctx, create, c.ID, err)
	}

	return &Response{Adjustment: a, Updates: fromUpdates(updates), Evictions: evictions.all()}, nil
}

// Update relays an update of a container's resources. The response has the resources to set, and
// updates of other containers.
func (r *Runtime) Update(
	ctx context.Context, p Pod, c *model.Container, want *runtimeapi.LinuxContainerResources,
) (*Response, error) {
	ctx, evictions := withEvictions(ctx)
	resp, err := r.adaptation.UpdateContainer(ctx, &api.UpdateContainerRequest{
		Pod:            toPod(p),
		Container:      toContainer(p, c),
		LinuxResources: toResources(want),
	})
	if err != nil {
		return nil, fail(ctx, updateOne, c.ID, err)
	}

	updates, err := evictions.complete(resp.GetUpdate())
	if err != nil {
		return nil, fail(ctx, updateOne, c.ID, err)
	}

	return &Response{Updates: fromUpdates(updates), Evictions: evictions.all()}, nil
}

// Stop relays the end of a container, and returns updates of other containers.
func (r *Runtime) Stop(ctx context.Context, p Pod, c *model.Container) (*Response, error) {
	ctx, evictions := withEvictions(ctx)
	resp, err := r.adaptation.StopContainer(ctx, &api.StopContainerRequest{
		Pod:       toPod(p),
		Container: toContainer(p, c),
	})
	if err != nil {
		return nil, fail(ctx, stop, c.ID, err)
	}

	updates, err := evictions.complete(resp.GetUpdate())
	if err != nil {
		return nil, fail(ctx, stop, c.ID, err)
	}

	return &Response{Updates: fromUpdates(updates)}, nil
}
