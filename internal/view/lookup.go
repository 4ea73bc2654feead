package view

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// Sandbox returns the sandbox with this ID or unique prefix of an ID. It returns NotFound, or
// InvalidArgument for an ambiguous prefix.
func (v *View) Sandbox(id string) (*model.Sandbox, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.store.findSandbox(id)
}

// Container returns the container with this ID or unique prefix of an ID. It returns NotFound, or
// InvalidArgument for an ambiguous prefix.
func (v *View) Container(id string) (*model.Container, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return find(&v.store, "container", id, func(o model.Object) *model.Container { return o.Container })
}

func (s *store) findSandbox(id string) (*model.Sandbox, error) {
	return find(s, "sandbox", id, func(o model.Object) *model.Sandbox { return o.Sandbox })
}

// find returns the object with this ID or unique prefix. of selects the kind of record.
func find[T any](s *store, kind, id string, of func(model.Object) *T) (*T, error) {
	if x := of(s.object(model.ContainerID(id))); x != nil {
		return x, nil
	}

	var hit *T
	for full, e := range s.entries {
		x := of(e.object)
		if x == nil || id == "" || !strings.HasPrefix(string(full), id) {
			continue
		}
		if hit != nil {
			return nil, fmt.Errorf("%s %s: several IDs have this prefix: %w", kind, id, errdefs.ErrInvalidArgument)
		}

		hit = x
	}

	if hit == nil {
		return nil, fmt.Errorf("%s %s: %w", kind, id, errdefs.ErrNotFound)
	}

	return hit, nil
}

// Sandboxes returns all sandboxes, newest first. The list is shared: read only.
func (v *View) Sandboxes() []*model.Sandbox {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.store.sort()
	return v.store.sortedSandboxes
}

// Containers returns all containers, newest first. The list is shared: read only.
func (v *View) Containers() []*model.Container {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.store.sort()
	return v.store.sortedContainers
}

// ContainersOf returns the containers of a sandbox, newest first.
func (v *View) ContainersOf(sandboxID model.ContainerID) []*model.Container {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.store.containersOf(sandboxID)
}
