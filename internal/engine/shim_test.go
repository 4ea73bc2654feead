package engine

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
)

// TestTrialWithoutResult verifies that a slow engine does not count as one that cannot run the
// shim.
func TestTrialWithoutResult(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		err  error
		want bool
	}{
		"removal timed out": {t.Context(), fmt.Errorf("remove container: %w", context.DeadlineExceeded), true},
		"trial timed out":   {ended, errdefs.ErrUnknown, true},
		"removal goes on":   {t.Context(), errors.Join(errdefs.ErrUnknown, errdefs.ErrConflict), true},
		"engine stopped":    {t.Context(), errdefs.ErrUnavailable, true},
		"shim not found":    {t.Context(), errdefs.ErrInvalidArgument, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := hasNoResult(c.ctx, c.err); got != c.want {
				t.Errorf("hasNoResult = %v", got)
			}
		})
	}
}
