package node

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// Sandbox is the sandbox with this ID or unique prefix of one. NotFound, or InvalidArgument for an ambiguous prefix.
func (v *View) Sandbox(id string) (*spec.Sandbox, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return find(v.store.sandboxes, "sandbox", id)
}

// Container is the container with this ID or unique prefix of one. NotFound, or InvalidArgument for an ambiguous prefix.
func (v *View) Container(id string) (*spec.Container, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return find(v.store.containers, "container", id)
}

func find[T any](all map[model.ContainerID]*T, kind, id string) (*T, error) {
	if x, ok := all[model.ContainerID(id)]; ok {
		return x, nil
	}
	var hit *T
	for full, x := range all {
		if id == "" || !strings.HasPrefix(string(full), id) {
			continue
		}
		if hit != nil {
			return nil, fmt.Errorf("%s %s: several IDs begin like this: %w", kind, id, errdefs.ErrInvalidArgument)
		}
		hit = x
	}
	if hit == nil {
		return nil, fmt.Errorf("%s %s: %w", kind, id, errdefs.ErrNotFound)
	}
	return hit, nil
}

// Sandboxes are all sandboxes, newest first. The list is shared: read only.
func (v *View) Sandboxes() []*spec.Sandbox {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.store.sort()
	return v.store.sortedSandboxes
}

// Containers are all containers, newest first. The list is shared: read only.
func (v *View) Containers() []*spec.Container {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.store.sort()
	return v.store.sortedContainers
}

// ContainersOf are a sandbox's containers, newest first.
func (v *View) ContainersOf(sandboxID model.ContainerID) []*spec.Container {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.store.of(sandboxID)
}
