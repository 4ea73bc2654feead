package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// sessionCheckInterval is the interval for checks of a session's container. A check is a lookup
	// in memory.
	sessionCheckInterval = 500 * time.Millisecond
	// sessionEndGrace gives a session time for its last output and exit code after its container
	// has ended. The engine closes the streams of a command 2 s after its end.
	sessionEndGrace = 3 * time.Second
)

// WhileRunning returns a context for a session in a container. The context ends soon after the
// container, with a FailedPrecondition error. The engine ends sessions itself if the container has
// its own PID namespace. Without one, Engine 20.10 does not, and a command of the session may
// continue to run. The caller must call stop.
func (g *gate) WhileRunning(ctx context.Context, containerID string) (_ context.Context, stop context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		check := time.NewTicker(sessionCheckInterval)
		defer check.Stop()

		var ended time.Time // first check with a stopped container
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
			case time.Since(ended) >= sessionEndGrace:
				cancel(fmt.Errorf("container %s has ended: %w", containerID, errdefs.ErrFailedPrecondition))
				return
			}
		}
	}()

	return ctx, func() { cancel(nil) }
}
