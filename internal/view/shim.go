package view

import (
	"context"
	"fmt"
	"time"

	"cri-dockerd/internal/model"
)

const (
	// The first trial of the containerd shim has trialMin: a pause starts in 0.1 s, and its image
	// loads in 0.2 s. Each further trial has twice as long, up to trialMax, because the node may be
	// slow instead of hung.
	trialMin = 20 * time.Second
	trialMax = 2 * time.Minute
	// trialPauseMax is the longest pause between two trials.
	trialPauseMax = time.Minute
)

// tryShim tries the containerd shim until the engine responds in time. Only new pods wait for a
// result, until trialMin has passed: a hanging trial container must not affect the others. pending
// is the state of the shim before. The error is ctx's.
func (v *View) tryShim(ctx context.Context, pending model.Shim) error {
	begin, timeout, pause := time.Now(), trialMin, backoffMin
	for {
		shim, err := v.tryShimOnce(ctx, timeout)
		if err == nil {
			v.setShim(shim)
			if !shim.IsActive() {
				v.log.Info("new pods cannot run under the containerd shim", "reason", shim.Problem)
			}
			return nil
		}

		if ctx.Err() != nil {
			return ctx.Err()
		}

		v.log.Warn("no result of the trial of the containerd shim; it is repeated", "timeout", timeout, "err", err)
		pending.IsOverdue = time.Since(begin) >= trialMin // not after a quick failure, such as a conflict
		pending.Problem = fmt.Sprintf("the trial of the shim had no result and is repeated: %v", err)
		v.setShim(pending)

		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}

		timeout, pause = min(2*timeout, trialMax), min(2*pause, trialPauseMax)
	}
}

func (v *View) tryShimOnce(ctx context.Context, timeout time.Duration) (model.Shim, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return v.src.TryShim(ctx)
}
