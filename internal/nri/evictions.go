package nri

import (
	"context"
	"strings"
	"sync"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// NRI's protocol has evictions, but NRI's library drops them from requests and responses. So they
// are read from the messages beside it.

// Eviction is the request of a plugin to stop a container.
type Eviction struct {
	ID     model.ContainerID
	Reason string
}

type evictionsKey struct{}

// evictions collects the evictions of one event, of all plugins.
type evictions struct {
	mu   sync.Mutex // guards list
	list []Eviction
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

// collectEvictions is the interceptor of calls to plugins. It reads evictions from their responses.
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

	case updateOne:
		m := &api.UpdateContainerResponse{}
		if err := proto.Unmarshal(resp.GetPayload(), m); err != nil {
			return err
		}
		e.add(m.GetEvict())
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
