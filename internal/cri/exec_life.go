package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// lifeInterval is how often the container of a session is checked. That costs a lookup in
	// memory.
	lifeInterval = 500 * time.Millisecond
	// endedGrace is for the last output and the exit code of a session whose container has ended.
	// The engine closes the streams of a command 2 s after its end.
	endedGrace = 3 * time.Second
)

// WhileRunning returns a context for a session in a container, which ends soon after the container
// does. The engine ends sessions itself where the container has a PID namespace of its own; else
// Engine 20.10 does not, and a command of the session may even run on. The error of the end is
// FailedPrecondition. stop must be called.
func (g *gate) WhileRunning(ctx context.Context, containerID string) (_ context.Context, stop context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		check := time.NewTicker(lifeInterval)
		defer check.Stop()

		var ended time.Time // when the container was first seen not to run
		for {
			select {
			case <-check.C:
			case <-ctx.Done():
				return
			}

			c, err := g.view.Container(containerID)
			switch {
			case err == nil && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING:
				ended = time.Time{}
			case ended.IsZero():
				ended = time.Now()
			case time.Since(ended) >= endedGrace:
				cancel(fmt.Errorf("container %s has ended: %w", containerID, errdefs.ErrFailedPrecondition))
				return
			}
		}
	}()

	return ctx, func() { cancel(nil) }
}
