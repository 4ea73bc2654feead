// Package undo is a stack of inverse steps: whoever acquires something pushes its undo on the next
// line, and a call that fails runs the stack newest first. Undoing survives the cancellation of the
// call that failed and has a deadline of its own.
package undo

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Stack holds the undos of one call. The zero value is ready; it is not safe for concurrent use.
type Stack struct {
	steps []step
}

type step struct {
	name string
	do   func(context.Context) error
}

// Push adds the undo of what has just been acquired. The name says what it undoes, for the error.
func (s *Stack) Push(name string, do func(ctx context.Context) error) {
	s.steps = append(s.steps, step{name, do})
}

// Release forgets all undos: the call has succeeded.
func (s *Stack) Release() { s.steps = nil }

// Run undoes everything, newest first, each step whatever the others did, and forgets it. The steps
// share one deadline and keep ctx's values but not its cancellation. It returns the joined errors
// of the steps.
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
