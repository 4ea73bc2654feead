package engine

import (
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/spec"
)

// Limit writes to the kernel what Docker cannot be told of a running container's resources. A
// container that has ended is no error: nothing of it is left to be limited. What this machine
// cannot do is FailedPrecondition, what the kernel refuses InvalidArgument; both name it.
func (e *Engine) Limit(c *spec.Container, l spec.KernelLimits) error {
	if l.Empty() || c.Pid == 0 {
		return nil
	}

	g, err := e.kernel.Of(c.Pid, string(c.ID))
	if err != nil {
		return ignore(err, errdefs.IsNotFound)
	}
	defer g.Close()

	if err := e.limit(g, l); err != nil {
		return fmt.Errorf("resources of container %s: %w", c.ID, err)
	}

	return nil
}

// limitsMark marks a control group in which LimitStarted has written all limits. A start again
// makes a new group, without it.
const limitsMark = "limits"

// LimitStarted is Limit of what the container's record asks for, unless that was done since the
// container started. The mark of it lies with the container's control group, so that it outlives
// the daemon and not the container.
func (e *Engine) LimitStarted(c *spec.Container) error {
	if c.Kernel.Empty() || c.Pid == 0 {
		return nil
	}

	g, err := e.kernel.Of(c.Pid, string(c.ID))
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

func (e *Engine) limit(g *cgroup.Group, l spec.KernelLimits) error {
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

// measure puts into a record what the kernel says of its container, if that runs on this machine.
func (e *Engine) measure(c *spec.Container) {
	if c == nil || c.Pid == 0 {
		return
	}

	g, err := e.kernel.Of(c.Pid, string(c.ID))
	if err != nil {
		return
	}
	defer g.Close()

	score, err := g.OOMScoreAdj()
	if err != nil {
		return
	}

	c.Measured(spec.KernelLimits{
		OOMScoreAdj: score,
		Hugepages:   g.Hugepages(slices.Collect(maps.Keys(c.Kernel.Hugepages))),
		Unified:     g.Unified(slices.Collect(maps.Keys(c.Kernel.Unified))),
	})
}
