package safefs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// walker returns a Walker of root. It counts files in files, and entered directories in dirs.
func walker(t *testing.T, root string, files, dirs *int) *Walker {
	t.Helper()
	dir, err := OpenDir(root)
	must(t, err)
	defer dir.Close()

	w, err := NewWalker(dir)
	must(t, err)
	t.Cleanup(w.Close)
	w.File = func(*unix.Stat_t) { *files++ }
	w.Dir = func(int, *unix.Stat_t) error { *dirs++; return nil }

	return w
}

var never = time.Now().Add(1000 * time.Hour)

// TestWalkOfMovedDirectory moves a directory out of the tree while the walk is deep below it. The
// walk must not read the directory's new parent.
func TestWalkOfMovedDirectory(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	// the parent of moved is closed when the walk reaches the bottom
	const deep, moved = 40, 40 - maxOpenDirs + 1
	at := func(level int) string { return filepath.Join(root, strings.Repeat("d/", level)) }
	must(t, os.MkdirAll(at(deep), 0o755))
	for i := range 3 * maxNames { // the walk has not read all of the parent's entries
		must(t, os.Mkdir(filepath.Join(at(moved-1), fmt.Sprint("beside", i)), 0o755))
		must(t, os.WriteFile(filepath.Join(outside, fmt.Sprint("secret", i)), nil, 0o600))
	}

	must(t, os.WriteFile(filepath.Join(root, "file"), nil, 0o600))

	var files, dirs int
	w := walker(t, root, &files, &dirs)
	ino := func(path string) uint64 {
		var st unix.Stat_t
		must(t, unix.Stat(path, &st))
		return st.Ino
	}

	bottom := ino(at(deep))
	w.Dir = func(_ int, st *unix.Stat_t) error {
		if dirs++; st.Ino == bottom {
			return os.Rename(at(moved), filepath.Join(outside, "moved"))
		}
		return nil
	}
	if done, err := w.Walk(never); !done || err != nil || !w.Partial() {
		t.Errorf("%v, %v, partial %v", done, err, w.Partial())
	}

	if files != 1 {
		t.Errorf("counted %d files, want 1", files)
	}
}

// TestWalkEnds expects the walk to end at its limits and to pause on request.
func TestWalkEnds(t *testing.T) {
	root := t.TempDir()
	for i := range 200 {
		must(t, os.MkdirAll(filepath.Join(root, fmt.Sprint(i), "x"), 0o755))
	}

	var files, dirs int
	w := walker(t, root, &files, &dirs)
	w.MaxEntries = 50
	if done, err := w.Walk(never); !done || err != nil || !w.Partial() || dirs > 60 {
		t.Errorf("%v, %v, partial %v after %d directories", done, err, w.Partial(), dirs)
	}

	files, dirs = 0, 0
	w = walker(t, root, &files, &dirs)
	stop := errors.New("stop")
	w.Check = func() error { return stop }
	if done, err := w.Walk(never); done || !errors.Is(err, stop) || dirs > 2*stepsPerCheck {
		t.Errorf("%v, %v after %d directories", done, err, dirs)
	}

	w.Check = nil
	pauses := 0
	for done := false; !done; pauses++ {
		var err error
		done, err = w.Walk(time.Now())
		must(t, err)
	}

	if dirs != 401 || pauses < 10 || w.Partial() {
		t.Errorf("%d directories after %d pauses, partial %v", dirs, pauses, w.Partial())
	}

	w = walker(t, root, &files, &dirs)
	w.Dir = func(int, *unix.Stat_t) error { return stop }
	if _, err := w.Walk(never); !errors.Is(err, stop) {
		t.Error(err)
	}
}

// TestWalkHoldsFewNames walks a tree with more names than fit into memory at once.
func TestWalkHoldsFewNames(t *testing.T) {
	root := t.TempDir()
	long := strings.Repeat("n", 250)
	dir, want := root, 1
	for range 5 {
		for i := range 100 {
			must(t, os.Mkdir(filepath.Join(dir, fmt.Sprintf("%s%04d", long, i)), 0o755))
			want++
		}
		dir = filepath.Join(dir, "z")
		must(t, os.Mkdir(dir, 0o755))
		want++
	}

	var files, dirs int
	w := walker(t, root, &files, &dirs)
	most := 0
	w.room = 10_000
	w.Dir = func(int, *unix.Stat_t) error { dirs++; most = max(most, w.bytes); return nil }
	if _, err := w.Walk(never); err != nil || dirs != want || w.Partial() {
		t.Errorf("%d directories, want %d; %v", dirs, want, err)
	}

	if most > w.room+5*300 {
		t.Errorf("%d bytes of names", most)
	}
}
