package exit

import (
	"errors"
	"fmt"
	"testing"
)

func TestCodeOf(t *testing.T) {
	cause := errors.New("cause")
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{cause, Failed},
		{UsageError(nil), 0},
		{UsageError(cause), Usage},
		{fmt.Errorf("more: %w", &Error{cause, ByHand}), ByHand},
	} {
		t.Run(fmt.Sprint(c.err), func(t *testing.T) {
			if got := CodeOf(c.err); got != c.want {
				t.Errorf("got %d, want %d", got, c.want)
			}
		})
	}

	if err := UsageError(cause); !errors.Is(err, cause) || err.Error() != "cause" {
		t.Errorf("UsageError does not wrap the cause: %v", err)
	}
}
