package node

import (
	"cmp"
	"slices"
	"time"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// store holds the records by ID. Looks at the engine overlap, and events come meanwhile, so what arrives later is not always newer: what
// began after the last news had come is; else who shows more of a life is newer, since lives only go on. The sorted lists are made when
// they are asked for and kept until something changes. What changes the records returns the steps that they took.
type store struct {
	ticket     uint64 // counts looks
	sandboxes  map[model.ContainerID]*spec.Sandbox
	containers map[model.ContainerID]*spec.Container
	news       map[model.ContainerID]news // also of objects that are gone
	leaving    map[model.ContainerID]leaving
	told       map[model.ContainerID]bool // the record is what events told: its times are a little late
	signs      map[model.ContainerID]signs

	sortedSandboxes  []*spec.Sandbox // nil: to be made
	sortedContainers []*spec.Container
}

// news is where the last news of an object came from.
type news struct {
	look uint64 // the last look that was taken
	came uint64 // the last look that had begun when the news came
}

// signs are what events told before an end, which says why it came.
type signs struct{ outOfMemory, killed bool }

// killedCode is the exit code of a process that got SIGKILL (128 + 9): from the engine, or from the kernel for want of memory.
const killedCode = 137

func newStore() store {
	return store{
		sandboxes: map[model.ContainerID]*spec.Sandbox{}, containers: map[model.ContainerID]*spec.Container{}, news: map[model.ContainerID]news{},
		leaving: map[model.ContainerID]leaving{}, told: map[model.ContainerID]bool{}, signs: map[model.ContainerID]signs{},
	}
}

// begin is the number of a look that begins.
func (s *store) begin() uint64 {
	s.ticket++
	return s.ticket
}

func (s *store) get(id model.ContainerID) spec.Object {
	return spec.Object{Sandbox: s.sandboxes[id], Container: s.containers[id]}
}

// put is what a look found under an ID: nothing means that it is gone or not ours.
func (s *store) put(id model.ContainerID, o spec.Object, look uint64) []step {
	was, now := s.get(id), lifeOf(o)
	n, known := s.news[id]
	if known && look <= n.came {
		if c := now.compare(lifeOf(was), s.told[id]); c < 0 || c == 0 && look < n.look {
			return nil
		}
	}
	s.news[id] = news{look: max(look, n.look), came: s.ticket}
	if l, ok := s.leaving[id]; ok && now.exists { // it is there after all
		was = l.object
		delete(s.leaving, id)
	}
	told := s.told[id]
	delete(s.told, id)
	s.set(id, o)
	if now.exists {
		return s.name(id, o, s.lastOf(o), steps(lifeOf(was), now, told))
	}
	if lifeOf(was).exists {
		s.leaving[id] = leaving{object: was, last: s.lastOf(was)}
	}
	return nil
}

func (s *store) set(id model.ContainerID, o spec.Object) {
	delete(s.sandboxes, id)
	delete(s.containers, id)
	s.sortedSandboxes, s.sortedContainers = nil, nil
	if o.Sandbox != nil {
		s.sandboxes[id] = o.Sandbox
	}
	if o.Container != nil {
		s.containers[id] = o.Container
	}
}

// hear takes what an event told of the life of what is known, so that nobody has to wait for a look: the engine holds an inspect up while
// it clears up after an end. What a look has shown already is no news.
func (s *store) hear(e engine.Event) []step {
	o := s.get(e.ID)
	left, isLeaving := s.leaving[e.ID]
	if isLeaving {
		o = left.object
	}
	was, sign := lifeOf(o), s.signs[e.ID]
	certain := e.ExitCode != killedCode || sign != (signs{}) || isLeaving // Docker may tell an out-of-memory after the end that it caused
	switch {
	case !was.exists:
		return nil
	case e.Kind == engine.OutOfMemory:
		s.signs[e.ID] = signs{outOfMemory: true, killed: sign.killed}
		return nil
	case e.Kind == engine.Killed:
		s.signs[e.ID] = signs{outOfMemory: sign.outOfMemory, killed: true}
		return nil
	case e.Kind == engine.Started && was.started.IsZero() && !was.over && (isLeaving || o.Sandbox == nil): // a sandbox that runs has a PID
		o = o.Begun(e.At)
	case e.Kind == engine.Died && !was.started.IsZero() && !was.over && e.At.After(was.started) && certain:
		o = o.Ended(e.At, e.ExitCode, sign.outOfMemory)
	default:
		return nil
	}
	if isLeaving {
		s.leaving[e.ID] = leaving{object: o, last: left.last}
	} else {
		s.set(e.ID, o)
		s.told[e.ID] = true
		s.news[e.ID] = news{look: s.news[e.ID].look, came: s.ticket}
		left.last = s.lastOf(o)
	}
	return s.name(e.ID, o, left.last, steps(was, lifeOf(o), false))
}

// lastOf is the sandbox of an object.
func (s *store) lastOf(o spec.Object) *spec.Sandbox {
	if o.Sandbox != nil {
		return o.Sandbox
	}
	return s.sandboxes[o.Container.SandboxID]
}

// name says whose steps they are.
func (s *store) name(id model.ContainerID, o spec.Object, last *spec.Sandbox, steps []step) []step {
	for i := range steps {
		steps[i].id, steps[i].pod, steps[i].last = id, id, last
		if o.Container != nil {
			steps[i].pod = o.Container.SandboxID
		}
	}
	return steps
}

// gone is a removal that is certain, at a time if that is known. It counts as a look.
func (s *store) gone(id model.ContainerID, at time.Time) []step {
	s.put(id, spec.Object{}, s.begin())
	l, ok := s.leaving[id]
	if !ok {
		return nil
	}
	delete(s.leaving, id)
	delete(s.signs, id)
	return s.name(id, l.object, l.last, lastSteps(lifeOf(l.object), at))
}

// replace is what a look at everything found.
func (s *store) replace(objects []spec.Object, look uint64) []step {
	var out []step
	found := map[model.ContainerID]bool{}
	for i, o := range objects {
		if o.Unread == "" {
			continue
		}
		found[o.Unread] = true
		if lifeOf(s.get(o.Unread)).exists { // what was read before is better than what the list says
			objects[i] = spec.Object{}
		}
	}
	for _, sandboxes := range []bool{true, false} { // a container's sandbox is known when it is told of
		for _, o := range objects {
			id := model.ContainerID("")
			switch {
			case sandboxes && o.Sandbox != nil:
				id = o.Sandbox.ID
			case !sandboxes && o.Container != nil:
				id = o.Container.ID
			default:
				continue
			}
			found[id] = true
			out = append(out, s.put(id, o, look)...)
		}
	}
	return append(out, s.miss(found, look)...)
}

// miss removes what a look at everything did not find, containers first.
func (s *store) miss(found map[model.ContainerID]bool, look uint64) []step {
	var containers, sandboxes []model.ContainerID
	for id, n := range s.news {
		o, left := s.get(id), s.leaving[id].object
		switch {
		case found[id] || n.came >= look:
		case o.Container != nil || left.Container != nil:
			containers = append(containers, id)
		case o.Sandbox != nil || left.Sandbox != nil:
			sandboxes = append(sandboxes, id)
		default:
			delete(s.news, id) // gone since the look before this one: no older look is still under way
		}
	}
	var out []step
	for _, id := range append(containers, sandboxes...) {
		out = append(out, s.gone(id, time.Time{})...)
	}
	return out
}

// of are a sandbox's containers, newest first.
func (s *store) of(sandboxID model.ContainerID) []*spec.Container {
	s.sort()
	var out []*spec.Container
	for _, c := range s.sortedContainers {
		if c.SandboxID == sandboxID {
			out = append(out, c)
		}
	}
	return out
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

func newest(a, b time.Time, idA, idB model.ContainerID) int {
	return cmp.Or(b.Compare(a), cmp.Compare(idA, idB))
}
