package engine

import (
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/model"
)

// Limit sets the resource limits of a running container that Docker's API lacks, directly in the
// kernel. An exited container is not an error. A limit not supported on this machine is
// FailedPrecondition; a value rejected by the kernel is InvalidArgument. Both errors name the
// limit.
func (e *Engine) Limit(c *model.Container, l model.KernelLimits) error {
	if l.Empty() || c.Pid == 0 {
		return nil
	}

	g, err := e.kernel.FindGroup(c.Pid, string(c.ID))
	if err != nil {
		return ignore(err, errdefs.IsNotFound)
	}
	defer g.Close()

	if err := e.limit(g, l); err != nil {
		return fmt.Errorf("resources of container %s: %w", c.ID, err)
	}

	return nil
}

// limitsMark marks a control group after LimitStarted has set all limits. A restarted container has
// a new control group without the mark.
const limitsMark = "limits"

// LimitStarted sets the limits of the container's record, unless this was done since the container
// started. A mark on the control group records it, so the record survives the daemon but not the
// container.
func (e *Engine) LimitStarted(c *model.Container) error {
	if c.Kernel.Empty() || c.Pid == 0 {
		return nil
	}

	g, err := e.kernel.FindGroup(c.Pid, string(c.ID))
	if err != nil {
		return ignore(err, errdefs.IsNotFound)
	}
	defer g.Close()

	if g.HasMark(limitsMark) {
		return nil
	}
	if err := e.limit(g, c.Kernel); err != nil {
		return fmt.Errorf("resources of container %s: %w", c.ID, err)
	}

	g.SetMark(limitsMark)

	return nil
}

func (e *Engine) limit(g *cgroup.Group, l model.KernelLimits) error {
	if err := g.SetHugepages(l.Hugepages); err != nil {
		return err
	}

	if err := g.SetUnified(l.Unified); err != nil {
		return err
	}

	if now, err := g.OOMScoreAdj(); l.OOMScoreAdj == 0 || (err == nil && now == l.OOMScoreAdj) {
		return nil
	}

	return g.SetOOMScoreAdj(l.OOMScoreAdj)
}

// measure adds the kernel's current limits to the record of a container on this machine.
func (e *Engine) measure(c *model.Container) {
	if c == nil || c.Pid == 0 {
		return
	}

	g, err := e.kernel.FindGroup(c.Pid, string(c.ID))
	if err != nil {
		return
	}
	defer g.Close()

	score, err := g.OOMScoreAdj()
	if err != nil {
		return
	}

	c.SetMeasured(model.KernelLimits{
		OOMScoreAdj: score,
		Hugepages:   g.Hugepages(slices.Collect(maps.Keys(c.Kernel.Hugepages))),
		Unified:     g.Unified(slices.Collect(maps.Keys(c.Kernel.Unified))),
	})
}
