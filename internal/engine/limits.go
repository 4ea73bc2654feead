package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/systemd"
)

// Docker's API lacks fields for huge pages, for most files of cgroup v2, and for the OOM score of a
// running container, so they are written into the container's control group. With Docker's systemd
// driver, systemd owns the files: it writes its own values at each daemon-reload and after each
// update by the OCI runtime. It keeps a value only as a property of the container's scope.

// Units is systemd; see systemd.Manager.
type Units interface {
	// SetProperties sets properties of a unit. NotFound if the unit has ended, InvalidArgument for
	// a rejected property, Unavailable if systemd does not answer before ctx ends.
	SetProperties(ctx context.Context, unit string, properties []systemd.Property) error
	// Sync returns after systemd has applied all earlier changes.
	Sync(ctx context.Context) error
	// Reloaded delivers an element after systemd may have replaced values.
	Reloaded() <-chan struct{}
}

// systemdTimeout bounds the calls of systemd for one container. A call takes a millisecond, and
// waits for a daemon-reload in progress.
const systemdTimeout = 3 * time.Second

// LimitsLost delivers an element after systemd may have replaced the limits of any container. It is
// nil without systemd.
func (e *Engine) LimitsLost() <-chan struct{} {
	if e.cfg.Units == nil {
		return nil
	}
	return e.cfg.Units.Reloaded()
}

// limitsMark is the mark of a control group after LimitStarted has set all limits. A restarted
// container has a new control group without it.
const limitsMark = "limits"

// limitsState is the content of limitsMark. It survives the daemon but not the container.
type limitsState struct {
	// Updates are the limits of updates since the start. Those of the start are in the record.
	Updates model.KernelLimits `json:"updates,omitzero"`
	// Unset: systemd has not confirmed the properties yet.
	Unset bool `json:"unset,omitempty"`
}

// limits are the limits of a running container. close releases them.
type limits struct {
	*cgroup.Group
	container *model.Container
	units     Units
	log       *slog.Logger
	started   bool // LimitStarted has set them
	state     limitsState
}

// limits returns the limits of a running container, or nil if it has ended.
func (e *Engine) limits(c *model.Container) *limits {
	if c.Pid == 0 {
		return nil
	}

	g, err := e.kernel.FindGroup(c.Pid, string(c.ID))
	if err != nil {
		return nil
	}

	l := &limits{Group: g, container: c, units: e.cfg.Units, log: e.cfg.Log}
	b, started := g.Mark(limitsMark)
	l.started = started

	if json.Unmarshal(b, &l.state) != nil || l.state.Updates.Check() != nil {
		l.state = limitsState{Unset: true} // older releases stored "1" and set no properties
	}

	return l
}

// LimitStarted sets the limits of the container's record, unless this was done since the container
// started. It does nothing if the container has ended. A limit not supported on this machine is
// FailedPrecondition; a value rejected by the kernel is InvalidArgument. Both errors name the
// limit. Unavailable means that the limits are set, but systemd has not confirmed to keep them.
func (e *Engine) LimitStarted(ctx context.Context, c *model.Container) error {
	l := e.limits(c)
	if l == nil {
		return nil
	}
	defer l.Close()

	if l.started || c.Kernel.Empty() && !l.V2() {
		return nil
	}

	return l.set(ctx, c.Kernel)
}

// Limit changes limits of a running container and remembers them until it ends. Results are those
// of LimitStarted.
func (e *Engine) Limit(ctx context.Context, c *model.Container, update model.KernelLimits) error {
	l := e.limits(c)
	if l == nil {
		return nil
	}
	defer l.Close()

	if !l.started && update.Empty() {
		return nil
	}

	l.state.Updates = l.state.Updates.With(update)

	return l.set(ctx, update)
}

// KeepLimits sets all limits of a started container again that somebody has replaced. Results are
// those of LimitStarted.
func (e *Engine) KeepLimits(ctx context.Context, c *model.Container) error {
	l := e.limits(c)
	if l == nil {
		return nil
	}
	defer l.Close()

	if !l.started {
		return nil // LimitStarted follows
	}

	return l.wrap(l.keep(ctx))
}

// set writes new limits, remembers the state, and has systemd keep all limits.
func (l *limits) set(ctx context.Context, n model.KernelLimits) error {
	if err := l.write(n); err != nil {
		return l.wrap(err)
	}

	l.state.Unset = l.state.Unset || !l.started || !n.Empty()
	if err := l.remember(); err != nil {
		return l.wrap(err)
	}

	return l.wrap(l.keep(ctx))
}

func (l *limits) wrap(err error) error {
	if err != nil {
		return fmt.Errorf("resources of container %s: %w", l.container.ID, err)
	}
	return nil
}

// write writes limits to the kernel.
func (l *limits) write(n model.KernelLimits) error {
	if err := l.SetHugepages(n.Hugepages); err != nil {
		return err
	}
	if err := l.SetUnified(n.Unified); err != nil {
		return err
	}

	if now, err := l.OOMScoreAdj(); n.OOMScoreAdj == 0 || (err == nil && now == n.OOMScoreAdj) {
		return nil
	}

	return l.SetOOMScoreAdj(n.OOMScoreAdj)
}

// remember stores the state with the control group.
func (l *limits) remember() error {
	b, err := json.Marshal(l.state)
	if err != nil {
		return err
	}

	if len(b) > cgroup.MaxMark {
		return fmt.Errorf("the limits of all updates have %d bytes as JSON, the maximum is %d: %w", len(b),
			cgroup.MaxMark, errdefs.ErrInvalidArgument)
	}

	// Without extended attributes of control groups, KeepLimits does not work for this container.
	_ = l.SetMark(limitsMark, b)

	return nil
}

// wanted returns the files of cgroup v2 and their values. The OCI runtime has no property for "no
// swap" and writes only the file (runc: a limit of 0 is unset), so it is among them.
func (l *limits) wanted() map[model.UnifiedKey]string {
	all := l.container.Kernel.With(l.state.Updates).Unified
	if _, ok := all[swapKey]; ok || !l.container.NoSwap() {
		return all
	}

	out := map[model.UnifiedKey]string{swapKey: "0"}
	maps.Copy(out, all)

	return out
}

const swapKey model.UnifiedKey = "memory.swap.max"

// keep restores lost limits. With systemd's driver it sets the properties if they are not set yet,
// or if a file shows that systemd has another value.
func (l *limits) keep(ctx context.Context) error {
	if !l.V2() {
		return nil
	}

	wanted := l.wanted()
	if l.Scope() == "" || l.units == nil || len(wanted) == 0 {
		return l.restore(wanted, l.LostUnified(wanted))
	}

	ctx, cancel := context.WithTimeout(ctx, systemdTimeout)
	defer cancel()

	var syncErr error
	if !l.state.Unset { // else setProperties follows
		syncErr = l.units.Sync(ctx)
	}

	lost := l.LostUnified(wanted)
	if err := l.restore(wanted, lost); err != nil { // even if systemd does not answer
		return err
	}

	if syncErr == nil && (l.state.Unset || slices.ContainsFunc(lost, systemd.HasProperty)) {
		return l.setProperties(ctx, wanted)
	}

	return syncErr
}

// setProperties sets the properties of the container's scope. systemd then writes all files of
// their controllers, with its own defaults for files without a property, so those are written last.
func (l *limits) setProperties(ctx context.Context, wanted map[model.UnifiedKey]string) error {
	err := l.setEach(ctx, systemd.Properties(wanted))
	if errdefs.IsNotFound(err) {
		return nil // the container has ended
	}
	if err != nil {
		return err
	}

	if err := l.units.Sync(ctx); err != nil {
		return err
	}
	if err := l.restore(wanted, l.LostUnified(wanted)); err != nil {
		return err
	}

	if !l.state.Unset {
		return nil
	}

	l.state.Unset = false

	return l.remember()
}

// setEach sets properties. If systemd rejects one, the others are set one by one: the kernel has
// accepted the value, and KeepLimits restores the file.
func (l *limits) setEach(ctx context.Context, properties []systemd.Property) error {
	if len(properties) == 0 {
		return nil
	}

	err := l.units.SetProperties(ctx, l.Scope(), properties)
	switch {
	case !errdefs.IsInvalidArgument(err):
		return err
	case len(properties) == 1:
		l.log.Warn("systemd does not keep a limit; it is written again after each reload of systemd",
			"container", l.container.ID, "err", err)
		return nil
	}

	for i := range properties {
		if err := l.setEach(ctx, properties[i:i+1]); err != nil {
			return err
		}
	}

	return nil
}

// restore writes lost files.
func (l *limits) restore(wanted map[model.UnifiedKey]string, lost []model.UnifiedKey) error {
	values := map[model.UnifiedKey]string{}
	for _, key := range lost {
		values[key] = wanted[key]
	}
	return l.SetUnified(values)
}

// Measure returns the record of a container with the kernel's current limits. If the container has
// ended or is not on this machine, it returns the record itself.
func (e *Engine) Measure(c *model.Container) *model.Container {
	l := e.limits(c)
	if l == nil {
		return c
	}
	defer l.Close()

	score, err := l.OOMScoreAdj()
	if err != nil {
		return c
	}

	requested := c.Kernel.With(l.state.Updates)

	return c.WithMeasured(model.KernelLimits{
		OOMScoreAdj: score,
		Hugepages:   l.Hugepages(slices.Collect(maps.Keys(requested.Hugepages))),
		Unified:     l.Unified(slices.Collect(maps.Keys(requested.Unified))),
	})
}
