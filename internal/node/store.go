package node

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"cri-dockerd/internal/spec"
)

// store holds the records by ID, with the number of the look that gave each, so that an older look never overwrites a newer one. The
// sorted lists are made when they are asked for and kept until something changes.
type store struct {
	sandboxes  map[string]*spec.Sandbox
	containers map[string]*spec.Container
	looks      map[string]uint64 // also of objects that are gone

	sortedSandboxes  []*spec.Sandbox // nil: to be made
	sortedContainers []*spec.Container
}

func newStore() store {
	return store{sandboxes: map[string]*spec.Sandbox{}, containers: map[string]*spec.Container{}, looks: map[string]uint64{}}
}

// put is what a look found under an ID: nothing means that it is gone or not ours.
func (s *store) put(id string, o spec.Object, look uint64) {
	if s.looks[id] > look {
		return
	}
	s.looks[id] = look
	delete(s.sandboxes, id)
	delete(s.containers, id)
	if o.Sandbox != nil {
		s.sandboxes[id] = o.Sandbox
	}
	if o.Container != nil {
		s.containers[id] = o.Container
	}
	s.sortedSandboxes, s.sortedContainers = nil, nil
}

// replace is what a look at everything found.
func (s *store) replace(objects []spec.Object, look uint64) {
	found := map[string]bool{}
	for _, o := range objects {
		var id string
		switch {
		case o.Sandbox != nil:
			id = o.Sandbox.ID
		case o.Container != nil:
			id = o.Container.ID
		default:
			continue
		}
		found[id] = true
		s.put(id, o, look)
	}
	for id, seen := range s.looks {
		if found[id] || seen >= look {
			continue
		}
		if s.sandboxes[id] == nil && s.containers[id] == nil {
			delete(s.looks, id) // gone since the look before this one: no older look is still under way
			continue
		}
		s.put(id, spec.Object{}, look)
	}
}

// sort makes the lists, newest first, by ID where the times are equal.
func (s *store) sort() {
	if s.sortedSandboxes == nil {
		s.sortedSandboxes = make([]*spec.Sandbox, 0, len(s.sandboxes))
		for _, x := range s.sandboxes {
			s.sortedSandboxes = append(s.sortedSandboxes, x)
		}
		slices.SortFunc(s.sortedSandboxes, func(a, b *spec.Sandbox) int { return newest(a.CreatedAt, b.CreatedAt, a.ID, b.ID) })
	}
	if s.sortedContainers == nil {
		s.sortedContainers = make([]*spec.Container, 0, len(s.containers))
		for _, x := range s.containers {
			s.sortedContainers = append(s.sortedContainers, x)
		}
		slices.SortFunc(s.sortedContainers, func(a, b *spec.Container) int { return newest(a.CreatedAt, b.CreatedAt, a.ID, b.ID) })
	}
}

func newest(a, b time.Time, idA, idB string) int {
	return cmp.Or(b.Compare(a), strings.Compare(idA, idB))
}
