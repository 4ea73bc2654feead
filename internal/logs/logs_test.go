package logs

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"cri-dockerd/internal/spec"
)

func newContainer(t *testing.T) *spec.Container {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "engine", "beef-json.log")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("line"), 0o600); err != nil {
		t.Fatal(err)
	}
	return &spec.Container{ID: "beefbeefbeefbeef", Name: "k8s_main", LogPath: filepath.Join(dir, "pods", "web", "main", "0.log"), EngineLogPath: file}
}

func TestLinkAndUnlink(t *testing.T) {
	s, c := NewSymlinks(slog.New(slog.DiscardHandler)), newContainer(t)
	for range 2 { // again after a restart of the daemon
		if err := s.Started(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(c.LogPath); err != nil || string(b) != "line" {
			t.Errorf("%q, %v", b, err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(c.LogPath), "*")); len(left) != 1 {
		t.Errorf("beside the link: %v", left)
	}
	other := *c
	other.EngineLogPath = "/other"
	if err := s.Removed(t.Context(), &other); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(c.LogPath); err != nil {
		t.Error("another container's removal took the link")
	}
	for range 2 {
		if err := s.Removed(t.Context(), c); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(c.LogPath); !os.IsNotExist(err) {
		t.Errorf("the link is still there: %v", err)
	}
}

func TestARealFileIsNotReplaced(t *testing.T) {
	s, c := NewSymlinks(slog.New(slog.DiscardHandler)), newContainer(t)
	if err := os.MkdirAll(filepath.Dir(c.LogPath), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.LogPath, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Started(t.Context(), c); err == nil {
		t.Error("no error")
	}
	if err := s.Removed(t.Context(), c); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(c.LogPath); string(b) != "precious" {
		t.Errorf("the file is %q now", b)
	}
}

func TestNothingToLink(t *testing.T) {
	s := NewSymlinks(slog.New(slog.DiscardHandler))
	for _, c := range []*spec.Container{{}, {LogPath: filepath.Join(t.TempDir(), "x")}, {EngineLogPath: "/x"}} {
		if err := s.Started(t.Context(), c); err != nil {
			t.Error(err)
		}
		if err := s.Removed(t.Context(), c); err != nil {
			t.Error(err)
		}
	}
	if s.Config("/x").Driver != "json-file" {
		t.Error("the driver is not json-file")
	}
}
