package podnet

import (
	"context"
	"fmt"
	"log/slog"
	"testing"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/model"
)

// startedLate is a sandbox that runs from the second query on, or never.
type startedLate struct {
	starts  bool
	queries int
}

func (s *startedLate) Sandbox(id string) (*model.Sandbox, error) {
	s.queries++
	return &model.Sandbox{
		ID:          model.ContainerID(id),
		Running:     s.starts && s.queries > 1,
		NetworkMode: "none",
	}, nil
}

func (*startedLate) IsRemoved(context.Context, model.ContainerID) (bool, error) { return true, nil }

// TestReclaimSparesStartedPods starts a pod while Reclaim waits for its lock. The pod keeps its
// network, and a stopped one loses it.
func TestReclaimSparesStartedPods(t *testing.T) {
	for _, starts := range []bool{true, false} {
		t.Run(fmt.Sprint("starts ", starts), func(t *testing.T) {
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
		})
	}
}
