package engine

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

// trialRemovalTimeout bounds the removal of a trial container after its trial.
const trialRemovalTimeout = 10 * time.Second

// newShim returns what is known of this project's containerd shim without a trial.
func newShim(mode string, h model.Host) model.Shim {
	s := model.Shim{Mode: mode}
	if !s.IsWanted() {
		s.Problem = "--containers=engine"
		return s
	}

	s.Problem = translate.ShimProblem(h)
	s.IsUnsupported = s.Problem != ""
	if !s.IsUnsupported {
		s.IsPending, s.Problem = true, "the trial of the shim has not ended"
	}

	return s
}

// TryShim returns whether pods can run under this project's containerd shim. Only containerd knows
// whether its PATH has the shim's programs, so a trial container decides. The error is Unavailable
// or DeadlineExceeded if the engine does not respond until ctx ends.
func (e *Engine) TryShim(ctx context.Context) (model.Shim, error) {
	s := model.Shim{
		Mode:            e.cfg.Containers,
		OutputDirectory: e.cfg.OutputDirectory,
		Adjustments:     e.cfg.Adjustments,
	}

	image, err := e.embeddedPause(ctx) // independent of registries
	if err != nil && hasNoResult(ctx, err) {
		return s, wrap(err, "try the containerd shim")
	}
	if err != nil {
		s.Problem = err.Error()
		return s, nil
	}

	var g errgroup.Group
	for problem, create := range map[*string]func(model.PauseImage) (*translate.Create, error){
		&s.Problem:       translate.NewShimTrial,
		&s.UserNSProblem: translate.NewUserNSTrial,
	} {
		g.Go(func() error {
			err := e.tryContainer(ctx, image, create)
			if err != nil && hasNoResult(ctx, err) {
				return wrap(err, "try the containerd shim")
			}
			if err != nil {
				*problem = err.Error()
			}
			return nil
		})
	}

	return s, g.Wait()
}

// hasNoResult reports whether a failed trial shows nothing about the shim: the engine did not
// respond in time, not even to the removal of the container, which has a timeout of its own, or it
// still creates or removes the container of an earlier trial (Conflict).
func hasNoResult(ctx context.Context, err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errdefs.IsConflict(err) || isUnanswered(ctx, err)
}

// tryContainer starts and removes a container.
func (e *Engine) tryContainer(
	ctx context.Context, image model.PauseImage, newTrial func(model.PauseImage) (*translate.Create, error),
) (err error) {
	trial, err := newTrial(image)
	if err != nil {
		return err
	}

	remove := func(ctx context.Context) error { return ignore(e.remove(ctx, trial.Name), errdefs.IsNotFound) }
	if err := remove(ctx); err != nil { // of an interrupted trial
		return err
	}

	defer func() { // also after a timeout; the next trial removes what the engine creates later
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), trialRemovalTimeout)
		defer cancel()
		err = errors.Join(err, remove(ctx))
	}()

	id, err := e.createUntil(ctx, trial)
	if err != nil {
		return err
	}

	return e.Start(ctx, id)
}
