package engine

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// TestErrorOfADownEngine expects the operation and the cause once, without the kind.
func TestErrorOfADownEngine(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "docker.sock")
	e, err := New(Config{Endpoint: "unix://" + socket, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()

	_, err = e.Host(t.Context())
	if !errdefs.IsUnavailable(err) || !strings.HasPrefix(err.Error(), "ping the engine at unix://"+socket+": ") ||
		strings.Contains(err.Error(), "unavailable") {
		t.Errorf("error %q, want Unavailable with the cause only", err)
	}
}
