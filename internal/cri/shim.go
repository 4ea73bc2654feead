package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// Condition for the runtime of new pods.
const containerdShim = "ContainerdShim"

// shimCondition reports whether new pods run under this project's containerd shim, with the reason
// if they do not.
func shimCondition(s model.Shim) *runtimeapi.RuntimeCondition {
	c := &runtimeapi.RuntimeCondition{Type: containerdShim, Status: s.IsActive(), Reason: "CreatedByShim"}
	switch {
	case s.IsActive():
	case s.IsOverdue:
		c.Reason, c.Message = "Overdue", s.Problem
	case s.IsPending:
		c.Reason, c.Message = "Pending", s.Problem
	case s.IsUnsupported:
		c.Reason, c.Message = "NotSupported", s.Problem
	default:
		c.Reason, c.Message = "CreatedByEngine", s.Problem
	}

	return c
}

// trialWait bounds the wait of a new pod for the first trial of the shim, which takes 0.2 s.
const trialWait = 10 * time.Second

// awaitTrial waits until the first trial of the shim has ended, or the engine is not ready. After a
// timeout the pod runs without the shim.
func awaitTrial(ctx context.Context, states EngineStates) error {
	timeout := time.NewTimer(trialWait)
	defer timeout.Stop()

	for {
		changed := states.Changed() // before the state, so that no change is missed
		if e := states.Engine(); !e.Ready || !e.Host.Shim.IsPending || e.Host.Shim.IsOverdue {
			return nil
		}

		select {
		case <-changed:
		case <-timeout.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// checkShim rejects a pod that may not run without the shim (--containers=shim). A runtime handler
// of the request names another runtime. The error is FailedPrecondition.
func checkShim(r *runtimeapi.RunPodSandboxRequest, h model.Host) error {
	if !h.Shim.IsRequired() || h.Shim.IsActive() || r.GetRuntimeHandler() != "" {
		return nil
	}
	return fmt.Errorf("--containers=shim: %s: %w; set --containers=auto to run pods without the shim", h.Shim.Problem,
		errdefs.ErrFailedPrecondition)
}
