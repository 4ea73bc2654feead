package engine

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// KillForgotten kills the processes of a running container if the engine has no record of its
// start, or no record of the container. It returns the number of killed processes. dockerd records
// a start after containerd has completed it. If dockerd is killed in between, it later considers
// the container created, and a forced removal does not kill its processes.
//
// The caller must prevent a concurrent start of the container. A start in progress holds the
// container's lock in the engine, and the inspect waits for this lock.
func (e *Engine) KillForgotten(ctx context.Context, id model.ContainerID) (killed int, err error) {
	return e.killForgotten(ctx, "/proc", id)
}

// killForgotten is KillForgotten with a given procfs, for tests.
func (e *Engine) killForgotten(ctx context.Context, proc string, id model.ContainerID) (killed int, err error) {
	if len(processesIn(proc, string(id))) == 0 { // the usual case needs no request
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

	for pause := time.Millisecond; ; pause *= 2 { // repeat, because processes may fork
		alive := 0
		for _, pid := range processesIn(proc, string(id)) {
			sent, err := sendSignals(proc, pid, string(id), unix.SIGKILL)
			if err != nil {
				return killed, wrap(err, "kill process %d of container %s", pid, id)
			}
			if sent {
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

// killTimeout bounds the time until processes exit after SIGKILL. A process blocked on disk I/O
// exits only when the I/O completes.
const killTimeout = 5 * time.Second

// isUnstarted reports whether the engine has never started the container, according to its record.
func isUnstarted(o model.Object) bool {
	switch {
	case o.Sandbox != nil:
		return !o.Sandbox.Running && o.Sandbox.StartedAt.IsZero()
	case o.Container != nil:
		return o.Container.State != runtimeapi.ContainerState_CONTAINER_RUNNING && o.Container.StartedAt.IsZero()
	default:
		return false
	}
}
