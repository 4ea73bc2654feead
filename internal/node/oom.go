package node

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// OOM is the kernel's own word on containers that ran out of memory, for ends of which the engine
// does not know the reason: it learns of them from containerd, whose event is missing where the
// memory hierarchy is not mounted for it, or with a runtime that does not watch it. No method may
// block.
type OOM interface {
	// Watch watches a container whose process was started at a time.
	Watch(id string, pid int, started time.Time)
	// Hit returns when the kernel last killed a process of a watched container for want of memory.
	Hit(id string) (at time.Time, hit bool)
	// Forget ends the watch of a container that was removed, or is started again.
	Forget(id string)
}

// noOOM knows nothing.
type noOOM struct{}

func (noOOM) Watch(string, int, time.Time) {}
func (noOOM) Hit(string) (time.Time, bool) { return time.Time{}, false }
func (noOOM) Forget(string)                {}

// oomWindow is how long before a container's end the kernel may have killed for the end to be its
// consequence. A large process takes seconds to give its memory back.
const oomWindow = 30 * time.Second

// SetOOM has the view ask a watch of the kernel's for reasons that the engine does not know. It must
// be called before Run.
func (v *View) SetOOM(o OOM) { v.oom = o }

// OOMHit has a container read again of which the kernel has reported a kill. If it has ended
// meanwhile, its record gets the reason.
func (v *View) OOMHit(id string) { v.dirty.mark(model.ContainerID(id), 0) }

// outOfMemoryLocked returns whether a container's end with SIGKILL is the OOM killer's work although
// the engine does not say so. Ends with other codes are not: a container may outlive the kill of a
// child, and then its end has another reason. Neither are those that the engine was asked for.
func (v *View) outOfMemoryLocked(id model.ContainerID, exitCode int, ended time.Time) bool {
	if exitCode != killedCode || v.store.signs[id].killed {
		return false
	}
	at, hit := v.oom.Hit(string(id))
	return hit && ended.Sub(at) <= oomWindow
}

// explainLocked adds the reason to a record of a container that has ended.
func (v *View) explainLocked(o spec.Object) spec.Object {
	c := o.Container
	if c == nil || c.State != runtimeapi.ContainerState_CONTAINER_EXITED || c.Reason != spec.ReasonError {
		return o
	}
	if !v.outOfMemoryLocked(c.ID, int(c.ExitCode), c.FinishedAt) {
		return o
	}
	return o.OutOfMemory()
}

// heedOOMLocked takes what an event means for the watch before its object takes it: an end may be the
// OOM killer's work, and what was before another start has nothing to do with the next end.
func (v *View) heedOOMLocked(e engine.Event) {
	c := v.store.containers[e.ID]
	switch {
	case e.Kind == engine.Started && c != nil && c.State == runtimeapi.ContainerState_CONTAINER_EXITED:
		delete(v.store.signs, e.ID)
		v.oom.Forget(string(e.ID))
	case e.Kind == engine.Died && v.outOfMemoryLocked(e.ID, e.ExitCode, e.At):
		v.store.signs[e.ID] = signs{outOfMemory: true}
	}
}

// watchOOMLocked has the kernel watch a container that runs, if this is its record.
func (v *View) watchOOMLocked(o spec.Object) {
	c := o.Container
	if c != nil && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING && c.Pid > 0 && v.store.containers[c.ID] == c {
		v.oom.Watch(string(c.ID), c.Pid, c.StartedAt)
	}
}
