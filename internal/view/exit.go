package view

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// Exits reports how the main processes of containers exited, as the kernel has it, for exits that
// the engine did not see. No method may block.
type Exits interface {
	// Watch watches the main process of a container.
	Watch(id string, pid int)
	// Exit returns the exit code of a process that was watched, and when it ended.
	Exit(id string) (code int, ended time.Time, ok bool)
	// Forget ends the watch of a container that was removed, or is started again.
	Forget(id string)
}

// noExits reports no exits.
type noExits struct{}

func (noExits) Watch(string, int)                  {}
func (noExits) Exit(string) (int, time.Time, bool) { return 0, time.Time{}, false }
func (noExits) Forget(string)                      {}

// lostCode is the exit code that the engine gives a container whose exit status it could not learn:
// the container ended while the engine and containerd were away (Moby, daemon/daemon.go, restore).
const lostCode = 255

// SetExits sets the source of exit codes that the engine has lost. Call it before Run.
func (v *View) SetExits(x Exits) { v.exits = x }

// lostExitLocked returns the kernel's exit code of a container and the time of its exit, if the
// engine's code stands for a lost one.
func (v *View) lostExitLocked(c *spec.Container, engineCode int) (code int, exited time.Time, ok bool) {
	if c == nil || engineCode != lostCode {
		return 0, time.Time{}, false
	}
	code, exited, ok = v.exits.Exit(string(c.ID))
	return code, exited, ok && code != lostCode && exited.After(c.StartedAt)
}

// addExitLocked adds to the record of a container that has exited what only the kernel knows: an
// exit code that the engine has lost, and that it was killed for want of memory.
func (v *View) addExitLocked(o spec.Object) spec.Object {
	c := o.Container
	if c == nil || c.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		return o
	}
	if code, exited, ok := v.lostExitLocked(c, int(c.ExitCode)); ok {
		o = o.Ended(exited, code, false)
	}

	return v.addOOMReasonLocked(o)
}

// restoreEventLocked returns the event of an exit with the exit code that the engine has lost.
func (v *View) restoreEventLocked(e engine.Event) engine.Event {
	if e.Kind != engine.Died {
		return e
	}
	if code, exited, ok := v.lostExitLocked(v.store.object(e.ID).Container, e.ExitCode); ok {
		e.ExitCode, e.At = code, exited
	}
	return e
}

// endOfLocked returns when a container exited: the kernel's time, or else the engine's, which may
// have noticed much later.
func (v *View) endOfLocked(id model.ContainerID, noticed time.Time) time.Time {
	if _, exited, ok := v.exits.Exit(string(id)); ok && exited.Before(noticed) {
		return exited
	}
	return noticed
}

// watchKernelLocked has the kernel watch a running container if o is its current record.
func (v *View) watchKernelLocked(o spec.Object) {
	c := o.Container
	if c == nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING || c.Pid <= 0 {
		return
	}

	if v.store.object(c.ID).Container == c {
		v.oom.Watch(string(c.ID), c.Pid, c.StartedAt)
		v.exits.Watch(string(c.ID), c.Pid)
	}
}
