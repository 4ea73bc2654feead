package view

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// Conceal sets the rule for objects that exist at the engine, but not for users of the view yet.
// The rule is asked once for each object, when the view first reads it. A concealed object is in
// Sandbox, Container, Sandboxes, Containers and ContainersOf, but not in Pod, and has no changes.
// The rule must not block. Call Conceal before Run.
func (v *View) Conceal(rule func(model.Object) bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.store.conceals = rule
}

// Reveal makes a concealed object visible and publishes the changes up to its state.
func (v *View) Reveal(id model.ContainerID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.publishLocked(v.store.reveal(id))
}

// IsConcealed reports whether an object is concealed. An unknown one is not.
func (v *View) IsConcealed(id model.ContainerID) bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.store.isConcealed(id)
}

// HasConcealed reports whether any object is concealed.
func (v *View) HasConcealed() bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.store.concealed > 0
}

// Visible is a View without concealed objects.
type Visible struct{ *View }

// Sandbox is View.Sandbox without concealed objects.
func (v Visible) Sandbox(id string) (*model.Sandbox, error) {
	sb, err := v.View.Sandbox(id)
	if err == nil && v.IsConcealed(sb.ID) {
		return nil, fmt.Errorf("sandbox %s: %w", sb.ID, errdefs.ErrNotFound)
	}
	return sb, err
}

// Container is View.Container without concealed objects.
func (v Visible) Container(id string) (*model.Container, error) {
	c, err := v.View.Container(id)
	if err == nil && v.IsConcealed(c.ID) {
		return nil, fmt.Errorf("container %s: %w", c.ID, errdefs.ErrNotFound)
	}
	return c, err
}

// Sandboxes is View.Sandboxes without concealed objects.
func (v Visible) Sandboxes() []*model.Sandbox {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.store.sort()
	return visible(&v.store, v.store.sortedSandboxes, func(sb *model.Sandbox) model.ContainerID { return sb.ID })
}

// Containers is View.Containers without concealed objects.
func (v Visible) Containers() []*model.Container {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.store.sort()
	return v.store.visibleContainers(v.store.sortedContainers)
}

// conceal applies the rule to an object that the view reads for the first time.
func (s *store) conceal(e *entry, o model.Object) {
	isNew := isEmpty(e.object) && e.removing == nil && !e.concealed && !isEmpty(o)
	if isNew && s.conceals != nil && s.conceals(o) {
		e.concealed = true
		s.concealed++
	}
}

func (s *store) isConcealed(id model.ContainerID) bool {
	e := s.entries[id]
	return e != nil && e.concealed
}

// reveal returns the transitions of a concealed object up to its state.
func (s *store) reveal(id model.ContainerID) []transition {
	e := s.entries[id]
	if e == nil || !e.concealed {
		return nil
	}

	e.concealed = false
	s.concealed--
	o := e.object
	if isEmpty(o) {
		return nil
	}

	return label(id, o, s.sandboxOf(o), lifecycle{}.transitionsTo(lifecycleOf(o), false))
}

// visible returns the objects that are not concealed. It does not change all.
func visible[T any](s *store, all []T, id func(T) model.ContainerID) []T {
	if s.concealed == 0 {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(o T) bool { return s.isConcealed(id(o)) })
}

func (s *store) visibleContainers(all []*model.Container) []*model.Container {
	return visible(s, all, func(c *model.Container) model.ContainerID { return c.ID })
}

// dropConcealed returns the transitions of visible objects.
func (s *store) dropConcealed(all []transition) []transition {
	return visible(s, all, func(t transition) model.ContainerID { return t.id })
}

// forgetConcealed ends the concealment of a removed object.
func (s *store) forgetConcealed(id model.ContainerID) {
	if e := s.entries[id]; e != nil && e.concealed {
		e.concealed = false
		s.concealed--
	}
}
