// Package undo provides a stack of inverse steps. A caller pushes the undo of each acquired
// resource on the next line. If the call fails, it runs the stack, newest step first. Undoing
// ignores the cancellation of the failed call and has its own deadline.
package undo

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Stack holds the undo steps of one call. The zero value is ready for use. It is not safe for
// concurrent use.
type Stack struct {
	steps []step
}

type step struct {
	name string
	do   func(context.Context) error
}

// Push adds the undo of a newly acquired resource. Errors of Run contain its name.
func (s *Stack) Push(name string, do func(ctx context.Context) error) {
	s.steps = append(s.steps, step{name, do})
}

// Release drops all steps after the call has succeeded.
func (s *Stack) Release() { s.steps = nil }

// Run runs and drops all steps, newest first, even if some fail. They share one deadline and keep
// ctx's values, but not its cancellation. Run returns the joined errors of the steps.
func (s *Stack) Run(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()

	var errs []error
	for i := len(s.steps) - 1; i >= 0; i-- {
		if err := s.steps[i].do(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", s.steps[i].name, err))
		}
	}

	s.steps = nil

	return errors.Join(errs...)
}
