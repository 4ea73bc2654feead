package view

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// lifecycle is the progress of a container or sandbox.
type lifecycle struct {
	created, started, ended time.Time
	exists                  bool
	exited                  bool // the process has ended, or never ran and never will
}

func lifecycleOf(o model.Object) lifecycle {
	switch {
	case o.Container != nil:
		c := o.Container
		return lifecycle{
			created: c.CreatedAt,
			started: c.StartedAt,
			ended:   c.FinishedAt,
			exists:  true,
			exited:  c.State == runtimeapi.ContainerState_CONTAINER_EXITED,
		}

	case o.Sandbox != nil:
		s := o.Sandbox
		return lifecycle{
			created: s.CreatedAt,
			started: s.StartedAt,
			ended:   s.FinishedAt,
			exists:  true,
			exited:  !s.Running && !s.NeverStarted,
		}
	}

	return lifecycle{}
}

// isRunning reports whether the process was started and has not ended.
func (l lifecycle) isRunning() bool { return !l.started.IsZero() && !l.exited }

// transition is one step of a lifecycle.
type transition struct {
	kind runtimeapi.ContainerEventType
	at   time.Time         // zero: unknown
	id   model.ContainerID // of the container or sandbox
	pod  model.ContainerID // ID of the sandbox
	last *model.Sandbox    // the last known record of the sandbox; nil if there was none
}

// hasRestarted reports whether a process was started since old was recorded. With fromEvent, old's
// times come from events, a little later than those in the engine's records.
func (l lifecycle) hasRestarted(old lifecycle, fromEvent bool) bool {
	if fromEvent {
		return l.started.After(old.started)
	}
	return !l.started.IsZero() && !l.started.Equal(old.started)
}

// compare orders two records of one object by their progress. It is positive if l is further along:
// created < running < exited < removed.
func (l lifecycle) compare(old lifecycle, fromEvent bool) int {
	if l.exists && old.exists && !l.started.IsZero() && !old.started.IsZero() && l.hasRestarted(old, fromEvent) {
		return l.started.Compare(old.started)
	}
	return l.progress() - old.progress()
}

func (l lifecycle) progress() int {
	switch {
	case !l.exists:
		return 3
	case l.exited:
		return 2
	case !l.started.IsZero():
		return 1
	}

	return 0
}

// transitionsTo returns the transitions between two records of an existing object, each once and in
// order, with any number of missed states in between. fromEvent: see hasRestarted.
func (l lifecycle) transitionsTo(now lifecycle, fromEvent bool) []transition {
	var out []transition
	if !l.exists {
		out = append(out, transition{kind: runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, at: now.created})
	}

	restarted := now.hasRestarted(l, fromEvent)
	if restarted {
		if l.isRunning() {
			out = append(out, transition{kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, at: now.started})
		}
		out = append(out, transition{kind: runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, at: now.started})
	}

	if now.exited && (!l.exited || restarted) {
		out = append(out, transition{kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, at: now.ended})
	}

	return out
}

// transitionsToRemoval returns the transitions up to the removal of an object.
func (l lifecycle) transitionsToRemoval(at time.Time) []transition {
	var out []transition
	if l.isRunning() {
		out = append(out, transition{kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, at: at})
	}
	return append(out, transition{kind: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT, at: at})
}
