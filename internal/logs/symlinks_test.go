package logs

import (
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/containerd/errdefs"

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
	s, c := &symlinks{log: slog.New(slog.DiscardHandler)}, newContainer(t)
	for range 2 { // again after a restart of the daemon
		if err := s.started(t.Context(), c); err != nil {
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
	if err := s.removed(t.Context(), &other); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(c.LogPath); err != nil {
		t.Error("another container's removal took the link")
	}
	for range 2 {
		if err := s.removed(t.Context(), c); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(c.LogPath); !os.IsNotExist(err) {
		t.Errorf("the link is still there: %v", err)
	}
}

func TestARealFileIsNotReplaced(t *testing.T) {
	s, c := &symlinks{log: slog.New(slog.DiscardHandler)}, newContainer(t)
	if err := os.MkdirAll(filepath.Dir(c.LogPath), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.LogPath, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.started(t.Context(), c); err == nil {
		t.Error("no error")
	}
	if err := s.removed(t.Context(), c); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(c.LogPath); string(b) != "precious" {
		t.Errorf("the file is %q now", b)
	}
}

func TestNothingToLink(t *testing.T) {
	s := &symlinks{log: slog.New(slog.DiscardHandler)}
	for _, c := range []*spec.Container{{}, {LogPath: filepath.Join(t.TempDir(), "x")}, {EngineLogPath: "/x"}} {
		if err := s.started(t.Context(), c); err != nil {
			t.Error(err)
		}
		if err := s.removed(t.Context(), c); err != nil {
			t.Error(err)
		}
	}
}

// TestReopenOfALink rotates as the kubelet does: it renames the link, and expects the old lines under the new name and the new ones at the
// old.
func TestReopenOfALink(t *testing.T) {
	s, c := &symlinks{log: slog.New(slog.DiscardHandler)}, newContainer(t)
	if err := s.started(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	engine, err := os.OpenFile(c.EngineLogPath, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	is := func(file, want string) {
		t.Helper()
		if b, err := os.ReadFile(file); err != nil || string(b) != want {
			t.Errorf("%s is %q, want %q; %v", filepath.Base(file), b, want, err)
		}
	}
	for i, old := range []string{"line", "line 1", "line 2"} {
		rotated := c.LogPath + ".2026010" + strconv.Itoa(i)
		if err := os.Rename(c.LogPath, rotated); err != nil {
			t.Fatal(err)
		}
		for range 2 { // again, since the first answer may not have arrived
			if err := s.reopen(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			is(rotated, old)
			is(c.LogPath, "")
			is(c.EngineLogPath, "")
		}
		if st, err := os.Lstat(rotated); err != nil || !st.Mode().IsRegular() || st.Mode().Perm() != 0o640 {
			t.Errorf("%v, %v", st, err)
		}
		if _, err := engine.WriteString("line " + strconv.Itoa(i+1)); err != nil {
			t.Fatal(err)
		}
		is(c.LogPath, "line "+strconv.Itoa(i+1))
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(c.LogPath), ".*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := s.reopen(t.Context(), c); err != nil { // nobody has renamed anything
		t.Error(err)
	}
	is(c.LogPath, "line 3")
	if err := s.reopen(t.Context(), &spec.Container{LogPath: "/x", LogDriver: "journald"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a driver without files: %v", err)
	}
	gone := *c
	gone.EngineLogPath = filepath.Join(t.TempDir(), "gone")
	for _, err := range []error{os.Remove(c.LogPath), os.Symlink(gone.EngineLogPath, c.LogPath+".20260109")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := s.reopen(t.Context(), &gone); err == nil {
		t.Error("the engine's file is gone, and nobody says so")
	}
	if _, err := os.Lstat(c.LogPath); !os.IsNotExist(err) {
		t.Errorf("a log was made in spite of the error: %v", err)
	}
}
