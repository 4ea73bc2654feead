package view

import (
	"cmp"
	"slices"
	"time"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
)

// killedCode is the exit code of a process that was killed by SIGKILL (128 + 9), by the engine or
// by the kernel's OOM killer.
const killedCode = 137

// store holds one entry per object. Inspections overlap, and events arrive meanwhile, so the last
// result is not always the newest. An inspection that started after the last accepted update wins.
// Otherwise the record that is further along wins (created < running < exited < removed).
//
// Methods that change records return the resulting transitions. The sorted lists are built on
// demand and kept until the next change.
type store struct {
	tickets uint64 // the number of started inspections
	// conceals decides on new objects, nil for none; concealed is the number of concealed ones
	conceals  func(model.Object) bool
	concealed int
	entries   map[model.ContainerID]*entry

	sortedSandboxes  []*model.Sandbox // nil: must be built
	sortedContainers []*model.Container
}

// entry is the state of one object. It remains for a while after the object's removal, so that a
// late result cannot restore the object.
type entry struct {
	// empty: the object does not exist, or was not found by the last inspection
	object    model.Object
	inspected uint64 // ticket of the last accepted inspection
	// ticket of the last inspection started before the object was updated
	updated uint64
	// object's times are those of events, a little later than the engine's records
	fromEvent bool
	concealed bool       // see View.Conceal
	removing  *removing  // an inspection did not find the object; nil otherwise
	pending   exitReason // for the next exit
}

// exitReason is what events have reported before an exit.
type exitReason struct{ outOfMemory, killed bool }

// removing is an object that an inspection did not find any more. Its removal is published with the
// engine's event, which follows all other events of the object, or once a later full read confirms
// it.
type removing struct {
	object model.Object
	last   *model.Sandbox
}

func newStore() store { return store{entries: map[model.ContainerID]*entry{}} }

// beginInspection returns the ticket of an inspection starting now.
func (s *store) beginInspection() uint64 {
	s.tickets++
	return s.tickets
}

// object returns the record of an object, or an empty one.
func (s *store) object(id model.ContainerID) model.Object {
	if e := s.entries[id]; e != nil {
		return e.object
	}
	return model.Object{}
}

// put takes the result of an inspection. An empty object does not exist, or is not managed.
func (s *store) put(id model.ContainerID, o model.Object, ticket uint64) []transition {
	e := s.entries[id]
	if e == nil {
		e = &entry{}
		s.entries[id] = e
	} else if e.isNewer(o, ticket) {
		return nil
	}

	s.conceal(e, o)
	old, fromEvent := e.object, e.fromEvent
	e.inspected, e.updated, e.fromEvent = max(ticket, e.inspected), s.tickets, false
	if e.removing != nil && !isEmpty(o) { // the object exists after all
		old, e.removing = e.removing.object, nil
	}

	s.set(e, o)
	if isEmpty(o) {
		if !isEmpty(old) {
			e.removing = &removing{object: old, last: s.sandboxOf(old)}
		}
		return nil
	}

	return label(id, o, s.sandboxOf(o), lifecycleOf(old).transitionsTo(lifecycleOf(o), fromEvent))
}

// isNewer reports whether the entry is newer than the result of an inspection.
func (e *entry) isNewer(o model.Object, ticket uint64) bool {
	if ticket > e.updated {
		return false
	}
	c := lifecycleOf(o).compare(lifecycleOf(e.object), e.fromEvent)
	return c < 0 || c == 0 && ticket < e.inspected
}

func isEmpty(o model.Object) bool { return o.Sandbox == nil && o.Container == nil }

// set replaces the record of an entry.
func (s *store) set(e *entry, o model.Object) {
	e.object = model.Object{Sandbox: o.Sandbox, Container: o.Container}
	s.sortedSandboxes, s.sortedContainers = nil, nil
}

// apply applies an event to a known object without an inspection: the engine delays inspections
// while it cleans up after an exit. Events of a state that an inspection has already shown change
// nothing.
func (s *store) apply(event engine.Event) []transition {
	e := s.entries[event.ID]
	if e == nil {
		return nil
	}

	o := e.object
	if e.removing != nil {
		o = e.removing.object
	}
	if isEmpty(o) {
		return nil
	}

	switch event.Kind {
	case engine.OutOfMemory:
		e.pending.outOfMemory = true
		return nil
	case engine.Killed:
		e.pending.killed = true
		return nil
	}

	next, changed := e.advance(o, event)
	if !changed {
		return nil
	}

	var last *model.Sandbox
	if e.removing != nil {
		last = e.removing.last
		e.removing = &removing{object: next, last: last}
	} else {
		s.set(e, next)
		e.fromEvent, e.updated = true, s.tickets
		last = s.sandboxOf(next)
	}

	return label(event.ID, next, last, lifecycleOf(o).transitionsTo(lifecycleOf(next), false))
}

// advance returns the object after a start or an exit.
func (e *entry) advance(o model.Object, event engine.Event) (next model.Object, changed bool) {
	l := lifecycleOf(o)
	switch event.Kind {
	case engine.Started:
		// A running sandbox needs its PID, available only from an inspection.
		if l.started.IsZero() && !l.exited && (e.removing != nil || o.Sandbox == nil) {
			return o.WithStart(event.At), true
		}

	case engine.Died:
		// Docker may report an out-of-memory after the exit that it caused.
		certain := event.ExitCode != killedCode || e.pending != (exitReason{}) || e.removing != nil
		if l.isRunning() && event.At.After(l.started) && certain {
			return o.WithExit(event.At, event.ExitCode, e.pending.outOfMemory), true
		}
	}

	return o, false
}

// sandboxOf returns the sandbox of an object, or nil if it is unknown.
func (s *store) sandboxOf(o model.Object) *model.Sandbox {
	if o.Sandbox != nil {
		return o.Sandbox
	}
	return s.object(o.Container.SandboxID).Sandbox
}

// label sets the object and the pod in transitions.
func label(id model.ContainerID, o model.Object, last *model.Sandbox, transitions []transition) []transition {
	for i := range transitions {
		transitions[i].id, transitions[i].pod, transitions[i].last = id, id, last
		if o.Container != nil {
			transitions[i].pod = o.Container.SandboxID
		}
	}
	return transitions
}

// remove records a confirmed removal, at a time if known. It counts as an inspection.
func (s *store) remove(id model.ContainerID, at time.Time) []transition {
	s.put(id, model.Object{}, s.beginInspection())
	e := s.entries[id]
	if e.removing == nil {
		return nil
	}

	r := e.removing
	e.removing, e.pending = nil, exitReason{}

	return label(id, r.object, r.last, lifecycleOf(r.object).transitionsToRemoval(at))
}

// replace takes the result of a full read.
func (s *store) replace(objects []model.Object, ticket uint64) []transition {
	found := map[model.ContainerID]bool{}
	var sandboxes, containers []model.Object
	for _, o := range objects {
		id := o.ID()
		found[id] = true
		switch {
		case o.Unread != "" && !isEmpty(s.object(id)): // an earlier inspection has more details than the list
		case o.Sandbox != nil:
			sandboxes = append(sandboxes, o)
		case o.Container != nil:
			containers = append(containers, o)
		}
	}

	// Sandboxes come first: the transitions of a container name its sandbox.
	var out []transition
	for _, o := range slices.Concat(sandboxes, containers) {
		out = append(out, s.put(o.ID(), o, ticket)...)
	}

	return append(out, s.removeMissing(found, ticket)...)
}

// removeMissing removes all objects that a full read did not find, containers first.
func (s *store) removeMissing(found map[model.ContainerID]bool, ticket uint64) []transition {
	var containers, sandboxes []model.ContainerID
	for id, e := range s.entries {
		o := e.object
		if e.removing != nil {
			o = e.removing.object
		}

		switch {
		case found[id] || e.updated >= ticket:
		case o.Container != nil:
			containers = append(containers, id)
		case o.Sandbox != nil:
			sandboxes = append(sandboxes, id)
		default:
			// Removed before the last full read: no older inspection is in progress.
			delete(s.entries, id)
		}
	}

	var out []transition
	for _, id := range append(containers, sandboxes...) {
		out = append(out, s.remove(id, time.Time{})...)
	}

	return out
}

// containersOf returns the containers of a sandbox, newest first.
func (s *store) containersOf(sandboxID model.ContainerID) []*model.Container {
	s.sort()
	var out []*model.Container
	for _, c := range s.sortedContainers {
		if c.SandboxID == sandboxID {
			out = append(out, c)
		}
	}

	return out
}

// sort builds both lists, newest first, by ID for equal times.
func (s *store) sort() {
	if s.sortedSandboxes != nil {
		return
	}

	s.sortedSandboxes, s.sortedContainers = []*model.Sandbox{}, []*model.Container{}
	for _, e := range s.entries {
		if e.object.Sandbox != nil {
			s.sortedSandboxes = append(s.sortedSandboxes, e.object.Sandbox)
		}
		if e.object.Container != nil {
			s.sortedContainers = append(s.sortedContainers, e.object.Container)
		}
	}

	slices.SortFunc(s.sortedSandboxes, func(a, b *model.Sandbox) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	slices.SortFunc(s.sortedContainers, func(a, b *model.Container) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
}
