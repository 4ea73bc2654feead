package cgroup

import (
	"os"
	"path/filepath"
	"testing"
)

// TestMarks expects a mark to be stored with its group: visible to every process, and removed with
// the group.
func TestMarks(t *testing.T) {
	root := t.TempDir()
	group := func() *Group { return &Group{kernel: Kernel{Cgroup: root}, v2: true, path: "/pod/container"} }
	dir := filepath.Join(root, "pod", "container")
	if group().SetMark("limits"); group().HasMark("limits") {
		t.Error("a missing group has a mark")
	}

	for range 2 { // the group of the next run has the same name
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}

		if group().HasMark("limits") {
			t.Error("a new group has a mark")
		}

		group().SetMark("limits")
		if !group().HasMark("limits") || group().HasMark("other") {
			t.Error("the mark is lost")
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}

	if err := os.Symlink(t.TempDir(), dir); err != nil {
		t.Fatal(err)
	}

	if group().SetMark("limits"); group().HasMark("limits") {
		t.Error("a link was followed")
	}
}
