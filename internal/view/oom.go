package view

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
)

// OOM reports the kernel's OOM kills, for exits whose reason the engine does not know. The engine
// learns of OOM kills from containerd. containerd's event is missing if the memory hierarchy is not
// mounted for it, if the runtime does not watch it, or if systemd removes the control group first.
// No method but Settle may block.
type OOM interface {
	// Watch watches a container of a pod, or its pause, whose process was started at this time.
	Watch(id, pod string, pid int, started time.Time)
	// Settle makes Hit complete for a container of a pod that has ended. killed is the time of its
	// exit if a SIGKILL ended it that nobody requested from the engine, or else zero. It may wait
	// for a second, unlike the others.
	Settle(id, pod string, created, killed time.Time)
	// Hit returns when the kernel last killed a process of a watched container for lack of memory.
	Hit(id string) (at time.Time, hit bool)
	// Forget ends the watch of a container that was removed or started again.
	Forget(id string)
}

// noOOM reports no kills.
type noOOM struct{}

func (noOOM) Watch(string, string, int, time.Time) {}
func (noOOM) Settle(_, _ string, _, _ time.Time)   {}
func (noOOM) Hit(string) (time.Time, bool)         { return time.Time{}, false }
func (noOOM) Forget(string)                        {}

// oomWindow is the longest time between an OOM kill and the resulting exit. A large process takes
// seconds to release its memory.
const oomWindow = 30 * time.Second

// SetOOM sets the source of exit reasons unknown to the engine. Call it before Run.
func (v *View) SetOOM(o OOM) { v.oom = o }

// ObserveOOM schedules an inspection of a container after a reported OOM kill. If it has exited
// meanwhile, its record gets the reason.
func (v *View) ObserveOOM(id string) { v.pending.add(model.ContainerID(id), 0) }

// settleOOM completes the kernel's reports for a container that has exited, before its record has
// the exit. Later it does nothing: whether an old SIGKILL was requested is unknown after a restart
// of the daemon, and the kernel remembers kills of children that the container survived. v.mu must
// not be locked.
func (v *View) settleOOM(id model.ContainerID, exitCode int, ended time.Time) {
	v.mu.Lock()
	e := v.store.entries[id]
	if e == nil || e.object.Container == nil || hasExited(e.object.Container) {
		v.mu.Unlock()
		return
	}
	c, killed := e.object.Container, time.Time{}
	if (exitCode == killedCode || exitCode == lostCode) && !e.pending.killed {
		killed = v.endOfLocked(id, ended)
	}
	v.mu.Unlock()

	v.oom.Settle(string(id), string(c.SandboxID), c.CreatedAt, killed)
}

// settleInspected is settleOOM for the result of an inspection.
func (v *View) settleInspected(o model.Object) {
	if c := o.Container; c != nil && hasExited(c) {
		v.settleOOM(c.ID, int(c.ExitCode), c.FinishedAt)
	}
}

func hasExited(c *model.Container) bool { return c.State == runtimeapi.ContainerState_CONTAINER_EXITED }

// isOOMLocked reports whether the OOM killer caused an exit that the engine did not mark as such.
// Only exits by SIGKILL count: a container may survive the kill of a child and exit later for
// another reason. Kills requested from the engine do not count either.
func (v *View) isOOMLocked(id model.ContainerID, exitCode int, ended time.Time) bool {
	e := v.store.entries[id]
	if exitCode != killedCode || e != nil && e.pending.killed {
		return false
	}
	at, hit := v.oom.Hit(string(id))
	return hit && v.endOfLocked(id, ended).Sub(at) <= oomWindow
}

// addOOMReasonLocked sets the reason in the record of a container killed by the OOM killer.
func (v *View) addOOMReasonLocked(o model.Object) model.Object {
	c := o.Container
	if c == nil || !hasExited(c) || c.Reason != model.ReasonError {
		return o
	}
	if !v.isOOMLocked(c.ID, int(c.ExitCode), c.FinishedAt) {
		return o
	}

	return o.WithOOMKill()
}

// observeOOMLocked processes an event before it is applied: an exit may be caused by the OOM
// killer, and a new start invalidates earlier kills.
func (v *View) observeOOMLocked(event engine.Event) {
	e := v.store.entries[event.ID]
	if e == nil {
		return
	}

	c := e.object.Container
	switch {
	case event.Kind == engine.Started && c != nil && hasExited(c):
		e.pending = exitReason{}
		v.oom.Forget(string(event.ID))
		v.exits.Forget(string(event.ID))
	case event.Kind == engine.Died && v.isOOMLocked(event.ID, event.ExitCode, event.At):
		e.pending = exitReason{outOfMemory: true}
	}
}
