package cri

import (
	"fmt"

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
	if !s.IsActive() {
		c.Reason, c.Message = "CreatedByEngine", s.Problem
	}
	return c
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
