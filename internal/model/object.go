package model

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Object is the record of one Docker container: a sandbox, a container, or neither if it does not
// belong to a pod. At most one of Sandbox and Container is set.
type Object struct {
	Sandbox   *Sandbox
	Container *Container
	// Unread is the ID of a container without a timely inspect. Its record, if there is one,
	// contains only facts from the engine's list and is marked as stale.
	Unread ContainerID
}

// Reasons for the exit of a container. The kubelet and its users know these words.
const (
	ReasonCompleted = "Completed"
	ReasonError     = "Error"
	ReasonOOM       = "OOMKilled"
	ReasonCannotRun = "ContainerCannotRun" // the start failed
)

// ExitReason returns the reason for the exit of a container that was started.
func ExitReason(exitCode int, isOutOfMemory bool) string {
	switch {
	case isOutOfMemory:
		return ReasonOOM
	case exitCode == 0:
		return ReasonCompleted
	}
	return ReasonError
}

// ID returns the ID of the object, "" if there is none.
func (o Object) ID() ContainerID {
	switch {
	case o.Sandbox != nil:
		return o.Sandbox.ID
	case o.Container != nil:
		return o.Container.ID
	}
	return o.Unread
}

// WithStart returns the object after the engine's start event and before the next inspect. The PID
// is not known yet.
func (o Object) WithStart(at time.Time) Object {
	if o.Container != nil {
		c := *o.Container
		c.State, c.StartedAt = runtimeapi.ContainerState_CONTAINER_RUNNING, at
		return Object{Container: &c}
	}

	s := *o.Sandbox
	s.Running, s.NeverStarted, s.StartedAt = true, false, at

	return Object{Sandbox: &s}
}

// WithExit returns the object after the engine's exit event and before the next inspect.
func (o Object) WithExit(at time.Time, exitCode int, isOutOfMemory bool) Object {
	if o.Container != nil {
		c := *o.Container
		c.State, c.FinishedAt, c.ExitCode, c.Pid = runtimeapi.ContainerState_CONTAINER_EXITED, at, int32(exitCode), 0
		c.Reason = ExitReason(exitCode, isOutOfMemory)
		return Object{Container: &c}
	}

	s := *o.Sandbox
	s.Running, s.Restarted, s.FinishedAt, s.ExitCode, s.Pid = false, false, at, exitCode, 0

	return Object{Sandbox: &s}
}

// WithOOMKill returns the container with the exit reason OOMKilled. The kernel reports OOM kills
// that the engine misses.
func (o Object) WithOOMKill() Object {
	c := *o.Container
	c.Reason = ReasonOOM
	return Object{Container: &c}
}
