package podnet

import (
	"context"
	"log/slog"
	"testing"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// startedLate is a sandbox that runs from the second time on that it is asked for, or never.
type startedLate struct {
	starts bool
	asked  int
}

func (s *startedLate) Sandbox(id string) (*spec.Sandbox, error) {
	s.asked++
	return &spec.Sandbox{
		ID:          model.ContainerID(id),
		Running:     s.starts && s.asked > 1,
		NetworkMode: "none",
	}, nil
}

func (*startedLate) IsRemoved(context.Context, model.ContainerID) (bool, error) { return true, nil }

// TestReclaimSparesWhatHasStarted: a pod that has started while Reclaim waited for the lock of its
// network keeps it. One that does not run loses it.
func TestReclaimSparesWhatHasStarted(t *testing.T) {
	for _, starts := range []bool{true, false} {
		network := &connected{pod: "aa"}
		m := NewManager(ManagerConfig{
			Network:     network,
			Namespaces:  noPins{},
			Pins:        noPins{},
			Checkpoints: checkpoint.New(t.TempDir()),
			Log:         slog.New(slog.DiscardHandler),
		})
		if err := m.Reclaim(t.Context(), &startedLate{starts: starts}); err != nil {
			t.Error(err)
		}

		if kept := network.pod != ""; kept != starts {
			t.Errorf("starts %t: kept %t", starts, kept)
		}
	}
}
