package nri

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// NRI's protocol has evictions, but NRI's library drops them from requests and responses. From
// updates in responses it drops the limit of processes. So both are read from the messages beside
// it.

// Eviction is the request of a plugin to stop a container.
type Eviction struct {
	ID     model.ContainerID
	Reason string
}

type evictionsKey struct{}

// evictions collects the evictions of one event and its limits of processes, of all plugins.
type evictions struct {
	mu   sync.Mutex // guards list and pids
	list []Eviction
	pids map[string][]int64 // container ID: different limits
}

// withEvictions returns a ctx whose calls to plugins collect evictions.
func withEvictions(ctx context.Context) (context.Context, *evictions) {
	e := &evictions{}
	return context.WithValue(ctx, evictionsKey{}, e), e
}

// evictionsOf returns the evictions that a ctx carries.
func evictionsOf(ctx context.Context) []Eviction {
	if e, ok := ctx.Value(evictionsKey{}).(*evictions); ok {
		return e.all()
	}
	return nil
}

func (e *evictions) all() []Eviction {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.list
}

func (e *evictions) add(requests []*api.ContainerEviction) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range requests {
		e.list = append(e.list, Eviction{
			ID:     model.ContainerID(r.GetContainerId()),
			Reason: text.Clean(r.GetReason(), text.MaxMessage),
		})
	}
}

// addUpdates collects the limits of processes.
func (e *evictions) addUpdates(updates []*api.ContainerUpdate) {
	e.mu.Lock()
	defer e.mu.Unlock()

	for _, u := range updates {
		p, id := u.GetLinux().GetResources().GetPids(), u.GetContainerId()
		if p == nil || slices.Contains(e.pids[id], p.GetLimit()) {
			continue
		}
		if e.pids == nil {
			e.pids = map[string][]int64{}
		}
		e.pids[id] = append(e.pids[id], p.GetLimit())
	}
}

// complete returns the updates of the library's response with the limits of processes. As with
// other resources, two plugins must not set different limits.
func (e *evictions) complete(updates []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
	e.mu.Lock()
	defer e.mu.Unlock()

	for _, u := range updates {
		limits, r := e.pids[u.GetContainerId()], u.GetLinux().GetResources()
		switch {
		case len(limits) == 0 || r == nil:
		case len(limits) > 1:
			return nil, fmt.Errorf("plugins tried to set the process limit of %s to %v",
				text.Clean(u.GetContainerId(), text.MaxName), limits)
		default:
			r.Pids = &api.LinuxPids{Limit: limits[0]}
		}
	}

	return updates, nil
}

// collectEvictions is the interceptor of calls to plugins. It reads evictions and limits of
// processes from their responses.
func collectEvictions(
	ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker,
) error {
	if err := call(ctx, req, resp); err != nil {
		return err
	}

	e, ok := ctx.Value(evictionsKey{}).(*evictions)
	if !ok {
		return nil
	}

	switch req.GetMethod() {
	case create:
		m := &api.CreateContainerResponse{}
		if err := proto.Unmarshal(resp.GetPayload(), m); err != nil {
			return err
		}
		e.add(m.GetEvict())
		e.addUpdates(m.GetUpdate())

	case updateOne:
		m := &api.UpdateContainerResponse{}
		if err := proto.Unmarshal(resp.GetPayload(), m); err != nil {
			return err
		}
		e.add(m.GetEvict())
		e.addUpdates(m.GetUpdate())

	case stop:
		m := &api.StopContainerResponse{}
		if err := proto.Unmarshal(resp.GetPayload(), m); err != nil {
			return err
		}
		e.addUpdates(m.GetUpdate())
	}

	return nil
}

// passEvictions is the interceptor of calls of plugins. It passes evictions of a request through
// the library in the ctx.
func passEvictions(
	ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method,
) (any, error) {
	if !strings.HasSuffix(info.FullMethod, "/UpdateContainers") {
		return method(ctx, unmarshal)
	}

	ctx, e := withEvictions(ctx)

	return method(ctx, func(v any) error {
		err := unmarshal(v)
		if m, ok := v.(*api.UpdateContainersRequest); ok && err == nil {
			e.add(m.GetEvict())
		}
		return err
	})
}
