package node

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// life is how far a container or sandbox has got.
type life struct {
	created, started, ended time.Time
	exists, over            bool // over: it does not run, and will not
}

func lifeOf(o spec.Object) life {
	switch {
	case o.Container != nil:
		c := o.Container
		return life{created: c.CreatedAt, started: c.StartedAt, ended: c.FinishedAt, exists: true, over: c.State == runtimeapi.ContainerState_CONTAINER_EXITED}
	case o.Sandbox != nil:
		s := o.Sandbox
		return life{created: s.CreatedAt, started: s.StartedAt, ended: s.FinishedAt, exists: true, over: !s.Running && !s.NeverStarted}
	}
	return life{}
}

// step is one transition of a life.
type step struct {
	kind runtimeapi.ContainerEventType
	at   time.Time         // zero: not known
	id   model.ContainerID // of the container or sandbox
	pod  model.ContainerID // the sandbox's ID
	last *spec.Sandbox     // what was last known of it, nil if it was not
}

// ranAnew says whether a process was started since the life was as in was. told: was is what events told, which is a little later than
// what the engine notes.
func (is life) ranAnew(was life, told bool) bool {
	if told {
		return is.started.After(was.started)
	}
	return !is.started.IsZero() && !is.started.Equal(was.started)
}

// compare says which of two records of something, which was there once, shows more of its life: positive if is does.
func (is life) compare(was life, told bool) int {
	rank := func(l life) int {
		switch {
		case !l.exists:
			return 3
		case l.over:
			return 2
		case !l.started.IsZero():
			return 1
		}
		return 0
	}
	if is.exists && was.exists && !is.started.IsZero() && !was.started.IsZero() && is.ranAnew(was, told) {
		return is.started.Compare(was.started)
	}
	return rank(is) - rank(was)
}

// steps are the transitions between two records of something that is there, each once and in order, whatever happened between. told: see
// ranAnew.
func steps(was, is life, told bool) []step {
	var out []step
	if !was.exists {
		out = append(out, step{kind: runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, at: is.created})
	}
	ranAnew := is.ranAnew(was, told)
	if ranAnew {
		if !was.started.IsZero() && !was.over { // somebody restarted it
			out = append(out, step{kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, at: is.started})
		}
		out = append(out, step{kind: runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, at: is.started})
	}
	if is.over && (!was.over || ranAnew) {
		out = append(out, step{kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, at: is.ended})
	}
	return out
}

// lastSteps are the transitions to a removal.
func lastSteps(was life, at time.Time) []step {
	var out []step
	if !was.started.IsZero() && !was.over {
		out = append(out, step{kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, at: at})
	}
	return append(out, step{kind: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT, at: at})
}

// leaving is something that a look did not find any more. Its removal is told when the engine's event has come, which comes after those
// of all that it did until then; or when a later look at everything does not find it either.
type leaving struct {
	object spec.Object
	last   *spec.Sandbox
}
