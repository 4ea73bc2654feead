package view

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// OOM reports the kernel's OOM kills, for exits of which the engine does not know the reason: it
// learns of them from containerd, whose event is missing where the memory hierarchy is not mounted
// for it, or with a runtime that does not watch it. No method may block.
type OOM interface {
	// Watch watches a container whose process was started at a time.
	Watch(id string, pid int, started time.Time)
	// Hit returns when the kernel last killed a process of a watched container for want of memory.
	Hit(id string) (at time.Time, hit bool)
	// Forget ends the watch of a container that was removed, or is started again.
	Forget(id string)
}

// noOOM reports no kills.
type noOOM struct{}

func (noOOM) Watch(string, int, time.Time) {}
func (noOOM) Hit(string) (time.Time, bool) { return time.Time{}, false }
func (noOOM) Forget(string)                {}

// oomWindow is the longest time between a kill and the exit that it causes. A large process takes
// seconds to give its memory back.
const oomWindow = 30 * time.Second

// SetOOM sets the source of exit reasons that the engine does not know. Call it before Run.
func (v *View) SetOOM(o OOM) { v.oom = o }

// ObserveOOM schedules an inspection of a container of which the kernel has reported a kill. If it
// has exited meanwhile, its record gets the reason.
func (v *View) ObserveOOM(id string) { v.pending.add(model.ContainerID(id), 0) }

// isOOMLocked returns whether the OOM killer caused an exit although the engine does not say so.
// Only exits by SIGKILL count: a container may outlive the kill of a child and exit later for
// another reason. Exits by a kill that the engine was asked for do not count either.
func (v *View) isOOMLocked(id model.ContainerID, exitCode int, ended time.Time) bool {
	e := v.store.entries[id]
	if exitCode != killedCode || e != nil && e.pending.killed {
		return false
	}
	at, hit := v.oom.Hit(string(id))
	return hit && v.endOfLocked(id, ended).Sub(at) <= oomWindow
}

// addOOMReasonLocked sets the reason in the record of a container that was killed for want of
// memory.
func (v *View) addOOMReasonLocked(o spec.Object) spec.Object {
	c := o.Container
	if c == nil || c.State != runtimeapi.ContainerState_CONTAINER_EXITED || c.Reason != spec.ReasonError {
		return o
	}
	if !v.isOOMLocked(c.ID, int(c.ExitCode), c.FinishedAt) {
		return o
	}

	return o.OutOfMemory()
}

// observeOOMLocked takes an event before it is applied to its object: an exit may be the OOM
// killer's work, and a new start ends the relevance of earlier kills.
func (v *View) observeOOMLocked(event engine.Event) {
	e := v.store.entries[event.ID]
	if e == nil {
		return
	}

	c := e.object.Container
	switch {
	case event.Kind == engine.Started && c != nil && c.State == runtimeapi.ContainerState_CONTAINER_EXITED:
		e.pending = exitReason{}
		v.oom.Forget(string(event.ID))
		v.exits.Forget(string(event.ID))
	case event.Kind == engine.Died && v.isOOMLocked(event.ID, event.ExitCode, event.At):
		e.pending = exitReason{outOfMemory: true}
	}
}
