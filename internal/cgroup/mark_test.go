package cgroup

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMarks expects a mark to be stored with its group: visible to every process, and removed with
// the group.
func TestMarks(t *testing.T) {
	root := t.TempDir()
	group := func() *Group { return &Group{kernel: Kernel{Cgroup: root}, v2: true, path: "/pod/container"} }
	dir := filepath.Join(root, "pod", "container")
	if err := group().SetMark("limits", []byte("1")); err == nil || hasMark(group()) {
		t.Errorf("mark of a missing group: %v", err)
	}

	for range 2 { // the group of the next run has the same name
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if hasMark(group()) {
			t.Error("a new group has a mark")
		}

		for _, data := range []string{"1", "", strings.Repeat("x", 2000)} {
			if err := group().SetMark("limits", []byte(data)); err != nil {
				t.Fatal(err)
			}
			if got, ok := group().Mark("limits"); !ok || string(got) != data {
				t.Errorf("%d bytes were stored, %d read, ok %v", len(data), len(got), ok)
			}
		}

		if _, ok := group().Mark("other"); ok {
			t.Error("a mark of another name was read")
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}

	if err := os.Symlink(t.TempDir(), dir); err != nil {
		t.Fatal(err)
	}

	if err := group().SetMark("limits", nil); err == nil || hasMark(group()) {
		t.Errorf("a link was followed: %v", err)
	}
}

func hasMark(g *Group) bool {
	_, ok := g.Mark("limits")
	return ok
}
