package conformance

import (
	"log/slog"
	"testing"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/engine/enginetest"
)

// TestEngineKeepsTheContract runs the contract suite of the fake engine on real engines.
func TestEngineKeepsTheContract(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		e, err := engine.New(engine.Config{Endpoint: "unix://" + n.own(t).Socket, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		enginetest.Contract(t, e, n.cgroupParent("contract"))
	})
}
