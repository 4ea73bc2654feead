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

// step is one step of the self-test. do returns a detail to print after success.
type step struct {
	name  string
	cause string // likely cause of a failure
	fix   shell.Line
	do    func(ctx context.Context) (string, error)
}

// stepError is the error of the step that failed.
type stepError struct {
	step step
	err  error
}

func (e *stepError) Error() string   { return fmt.Sprintf("%v: %s", errFailed, e.step.name) }
func (e *stepError) Is(t error) bool { return t == errFailed }
func (e *stepError) Unwrap() error   { return e.err }

const stepTimeout = 2 * time.Minute

var errFailed = errors.New("check failed")

// run runs the steps in order and prints a line with the duration of each. It stops at the first
// failure.
func run(ctx context.Context, out io.Writer, steps []step) error {
	for _, s := range steps {
		begin := time.Now()
		detail, err := runStep(ctx, s.do)
		took := time.Since(begin).Round(time.Millisecond)
		if err != nil {
			fmt.Fprintf(out, "FAIL %8s  %s\n     %s\n     likely cause: %s\n     fix: %s\n", took, s.name,
				text.Clean(err.Error(), text.MaxMessage), s.cause, s.fix)
			return &stepError{s, err}
		}

		fmt.Fprintf(out, "ok   %8s  %s", took, s.name)
		if detail != "" {
			fmt.Fprintf(out, ": %s", text.Clean(detail, text.MaxMessage))
		}

		fmt.Fprintln(out)
	}

	fmt.Fprintf(out, "check: all %d steps passed\n", len(steps))

	return nil
}

func runStep(ctx context.Context, do func(context.Context) (string, error)) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	return do(ctx)
}

// eventually calls try until it succeeds, ctx ends or timeout expires. It returns the last error.
func eventually(ctx context.Context, timeout time.Duration, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
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
