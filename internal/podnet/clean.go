package podnet

import (
	"cri-dockerd/internal/text"
)

// boundError limits the length of an error's text for responses and logs. It keeps the error's
// kind.
func boundError(err error) error {
	if err == nil || text.Clean(err.Error(), text.MaxMessage) == err.Error() {
		return err
	}
	return &bounded{err}
}

type bounded struct{ err error }

func (b *bounded) Error() string { return text.Clean(b.err.Error(), text.MaxMessage) }
func (b *bounded) Unwrap() error { return b.err }
