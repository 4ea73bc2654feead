package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"cri-dockerd/internal/shell"
	"cri-dockerd/internal/text"
)

// step is one thing that must work. do returns what to show of a success.
type step struct {
	name  string
	cause string // the likely one, when it fails
	fix   shell.Line
	do    func(ctx context.Context) (string, error)
}

// stepError is the end of a run.
type stepError struct {
	step step
	err  error
}

func (e *stepError) Error() string   { return fmt.Sprintf("%v: %s", errFailed, e.step.name) }
func (e *stepError) Is(t error) bool { return t == errFailed }
func (e *stepError) Unwrap() error   { return e.err }

const stepDeadline = 2 * time.Minute

var errFailed = errors.New("check failed")

// run does the steps in order, a line for each with its time, and ends at the first that fails.
func run(ctx context.Context, out io.Writer, steps []step) error {
	for _, s := range steps {
		begin := time.Now()
		said, err := within(ctx, s.do)
		took := time.Since(begin).Round(time.Millisecond)
		if err != nil {
			fmt.Fprintf(out, "FAIL %8s  %s\n     %s\n     likely cause: %s\n     fix: %s\n", took, s.name,
				text.Clean(err.Error(), text.MaxMessage), s.cause, s.fix)
			return &stepError{s, err}
		}

		fmt.Fprintf(out, "ok   %8s  %s", took, s.name)
		if said != "" {
			fmt.Fprintf(out, ": %s", text.Clean(said, text.MaxMessage))
		}

		fmt.Fprintln(out)
	}

	fmt.Fprintf(out, "check: all %d steps passed\n", len(steps))

	return nil
}

func within(ctx context.Context, do func(context.Context) (string, error)) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepDeadline)
	defer cancel()
	return do(ctx)
}

// eventually tries until it works, or ctx ends, or patience is over; it returns the last error.
func eventually(ctx context.Context, patience time.Duration, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()

	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()

	for {
		err := try(ctx)
		if err == nil {
			return nil
		}

		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}
