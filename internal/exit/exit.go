// Package exit defines errors with an exit code (EXIT STATUS in the manual page).
package exit

import "errors"

// Exit codes of the program.
const (
	Failed = 1
	Usage  = 2 // a mistake on the command line
	ByHand = 3 // takeover: manual steps remain
)

// Error is an error with an exit code.
type Error struct {
	Err  error
	Code int
}

func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the error without its code.
func (e *Error) Unwrap() error { return e.Err }

// UsageError marks an error as a mistake on the command line; nil stays nil.
func UsageError(err error) error {
	if err == nil {
		return nil
	}
	return &Error{err, Usage}
}

// CodeOf returns the code of an error: 0 for nil, Failed for one without a code.
func CodeOf(err error) int {
	var coded *Error
	switch {
	case err == nil:
		return 0
	case errors.As(err, &coded):
		return coded.Code
	}

	return Failed
}
