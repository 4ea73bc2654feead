package view

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
)

// Exits reports from the kernel how the main processes of containers exited, for exits that the
// engine missed. No method may block.
type Exits interface {
	// Watch watches the main process of a container.
	Watch(id string, pid int)
	// Exit returns the exit code and the time of the exit of a watched process.
	Exit(id string) (code int, ended time.Time, ok bool)
	// Forget ends the watch of a container that was removed or started again.
	Forget(id string)
}

// noExits reports no exits.
type noExits struct{}

func (noExits) Watch(string, int)                  {}
func (noExits) Exit(string) (int, time.Time, bool) { return 0, time.Time{}, false }
func (noExits) Forget(string)                      {}

// lostCode is the exit code that the engine reports if it could not get the exit status: the
// container exited while the engine and containerd were down (Moby, daemon/daemon.go, restore).
const lostCode = 255

// SetExits sets the source of exit codes that the engine has lost. Call it before Run.
func (v *View) SetExits(x Exits) { v.exits = x }

// lostExitLocked returns the kernel's exit code and exit time of a container if the engine has lost
// its exit code.
func (v *View) lostExitLocked(c *model.Container, engineCode int) (code int, exited time.Time, ok bool) {
	if c == nil || engineCode != lostCode {
		return 0, time.Time{}, false
	}
	code, exited, ok = v.exits.Exit(string(c.ID))
	return code, exited, ok && code != lostCode && exited.After(c.StartedAt)
}

// addExitLocked adds the kernel's information to the record of an exited container: the exit code
// if the engine has lost it, and an out-of-memory kill.
func (v *View) addExitLocked(o model.Object) model.Object {
	c := o.Container
	if c == nil || !hasExited(c) {
		return o
	}
	if code, exited, ok := v.lostExitLocked(c, int(c.ExitCode)); ok {
		o = o.WithExit(exited, code, false)
	}

	return v.addOOMReasonLocked(o)
}

// restoreEventLocked replaces a lost exit code in the event of an exit.
func (v *View) restoreEventLocked(e engine.Event) engine.Event {
	if e.Kind != engine.Died {
		return e
	}
	if code, exited, ok := v.lostExitLocked(v.store.object(e.ID).Container, e.ExitCode); ok {
		e.ExitCode, e.At = code, exited
	}
	return e
}

// endOfLocked returns the exit time of a container: the kernel's, or else the engine's, which may
// be much later.
func (v *View) endOfLocked(id model.ContainerID, noticed time.Time) time.Time {
	if _, exited, ok := v.exits.Exit(string(id)); ok && exited.Before(noticed) {
		return exited
	}
	return noticed
}

// watchKernelLocked has the kernel watch a running container or pause if o is its current record.
func (v *View) watchKernelLocked(o model.Object) {
	if s := o.Sandbox; s != nil && s.Pid > 0 && v.store.object(s.ID).Sandbox == s {
		v.oom.Watch(string(s.ID), string(s.ID), s.Pid, s.StartedAt)
	}

	c := o.Container
	if c == nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING || c.Pid <= 0 {
		return
	}

	if v.store.object(c.ID).Container == c {
		v.oom.Watch(string(c.ID), string(c.SandboxID), c.Pid, c.StartedAt)
		v.exits.Watch(string(c.ID), c.Pid)
	}
}
