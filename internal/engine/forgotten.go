package engine

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// KillForgotten kills the processes of a container that runs although the engine has no record of
// its start, or no record of the container. It returns how many processes it has killed. dockerd
// records a start after containerd has carried it out; an engine that is killed in between takes
// the container for created, and a forced removal does not end it.
//
// The caller must keep the container from being started meanwhile. A start that is under way in the
// engine holds the container's lock there, and the inspect waits for that lock.
func (e *Engine) KillForgotten(ctx context.Context, id model.ContainerID) (killed int, err error) {
	return e.killForgotten(ctx, "/proc", id)
}

// killForgotten is KillForgotten with another procfs, for tests.
func (e *Engine) killForgotten(ctx context.Context, proc string, id model.ContainerID) (killed int, err error) {
	if len(processesIn(proc, string(id))) == 0 { // the usual case, without a request
		return 0, nil
	}

	o, err := e.Inspect(ctx, id)
	if err == nil && !isUnstarted(o) {
		return 0, nil
	}

	if err != nil && !errdefs.IsNotFound(err) {
		return 0, err
	}

	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()

	for pause := time.Millisecond; ; pause *= 2 { // it may fork
		alive := 0
		for _, pid := range processesIn(proc, string(id)) {
			hit, err := sendSignals(proc, pid, string(id), unix.SIGKILL)
			if err != nil {
				return killed, wrap(err, "kill process %d of container %s", pid, id)
			}
			if hit {
				alive++
			}
		}

		if killed = max(killed, alive); alive == 0 {
			return killed, nil
		}

		select {
		case <-ctx.Done():
			return killed, wrap(ctx.Err(), "kill the processes of container %s", id)
		case <-time.After(pause):
		}
	}
}

// killTimeout is how long processes may take to end after SIGKILL. One that waits for a disk ends
// when that answers.
const killTimeout = 5 * time.Second

// isUnstarted reports whether the engine says of a container of ours that it was never started.
func isUnstarted(o spec.Object) bool {
	switch {
	case o.Sandbox != nil:
		return !o.Sandbox.Running && o.Sandbox.StartedAt.IsZero()
	case o.Container != nil:
		return o.Container.State != runtimeapi.ContainerState_CONTAINER_RUNNING && o.Container.StartedAt.IsZero()
	default:
		return false
	}
}
