package cri

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
)

// TestReplaceContent replaces a pod's file with every type of file available to a container with
// the engine's data root as a volume. Only a regular file in its place is written, in place.
func TestReplaceContent(t *testing.T) {
	const id model.ContainerID = "aaaabbbbccccddddaaaabbbbccccddddaaaabbbbccccddddaaaabbbbccccdddd"
	for name, c := range map[string]struct {
		plant func(t *testing.T, file, victim string) error
		path  func(file, victim string) string // the path reported by the engine; nil for the file
		ok    bool
	}{
		"its own": {
			plant: func(_ *testing.T, file, _ string) error {
				return os.WriteFile(file, []byte("longer than the new content"), 0o644)
			},
			ok: true,
		},
		"a link":      {plant: func(_ *testing.T, file, victim string) error { return os.Symlink(victim, file) }},
		"a hard link": {plant: func(_ *testing.T, file, victim string) error { return os.Link(victim, file) }},
		"a FIFO":      {plant: func(_ *testing.T, file, _ string) error { return unix.Mkfifo(file, 0o644) }},
		"a directory": {plant: func(_ *testing.T, file, _ string) error { return os.Mkdir(file, 0o755) }},
		"a link above": {plant: func(_ *testing.T, file, victim string) error {
			return errors.Join(os.Remove(filepath.Dir(file)), os.Symlink(filepath.Dir(victim), filepath.Dir(file)))
		}},
		"another path": {
			plant: func(_ *testing.T, file, _ string) error { return os.WriteFile(file, nil, 0o644) },
			path:  func(_, victim string) string { return victim },
		},
		"a path with dots": {
			plant: func(_ *testing.T, file, _ string) error { return os.WriteFile(file, nil, 0o644) },
			path:  func(file, _ string) string { return filepath.Dir(file) + "/../../resolv.conf" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "docker")
			victim := filepath.Join(filepath.Dir(root), "resolv.conf")
			file := filepath.Join(root, "containers", string(id), "resolv.conf")
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(victim, []byte("victim"), 0o644),
				c.plant(t, file, victim)); err != nil {
				t.Fatal(err)
			}

			path := file
			if c.path != nil {
				path = c.path(file, victim)
			}

			err := replaceContent(root, id, path, []byte("new"))
			if (err == nil) != c.ok {
				t.Errorf("error: %v", err)
			}

			if b, err := os.ReadFile(victim); err != nil || string(b) != "victim" {
				t.Errorf("the outside file contains %q, %v", b, err)
			}

			if !c.ok {
				return
			}
			if b, err := os.ReadFile(file); err != nil || string(b) != "new" {
				t.Errorf("the file contains %q, %v", b, err)
			}
		})
	}
}
