package safefs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestWriteFileIsAtomic expects a failure at any step to preserve the old content and to remove the
// temporary file.
func TestWriteFileIsAtomic(t *testing.T) {
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		file    string
		prepare func(*os.File) error
		want    string
		fails   bool
	}{
		"written": {"file", nil, "new", false},
		"prepared": {"file", func(f *os.File) error {
			_, err := f.WriteString("!")
			return err
		}, "new!", false},
		"prepare fails":     {"file", func(*os.File) error { return boom }, "old", true},
		"write fails":       {"file", func(f *os.File) error { return errors.Join(f.Close(), boom) }, "old", true},
		"rename fails":      {"missing/file", nil, "old", true},
		"over a directory":  {"directory", nil, "old", true},
		"temporary removed": {"file", func(f *os.File) error { return os.Remove(f.Name()) }, "old", true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			err := errors.Join(os.WriteFile(filepath.Join(dir, "file"), []byte("old"), 0o600),
				os.Mkdir(filepath.Join(dir, "directory"), 0o700))
			if err != nil {
				t.Fatal(err)
			}

			err = WriteFile(filepath.Join(dir, c.file), filepath.Join(dir, ".new-*"), []byte("new"), c.prepare)
			if (err != nil) != c.fails {
				t.Errorf("error %v", err)
			}

			if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != c.want {
				t.Errorf("content %q, %v; want %q", b, err, c.want)
			}

			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
				t.Errorf("directory has entries %v (%v), want 2", entries, err)
			}
		})
	}
}

func TestRenameRemovesTheTemporaryFile(t *testing.T) {
	dir, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()

	for name, fails := range map[string]bool{"name": false, "missing/name": true} {
		t.Run(name, func(t *testing.T) {
			tmp := TemporaryName()
			if err := os.WriteFile(filepath.Join(dir.Name(), tmp), nil, 0o600); err != nil {
				t.Fatal(err)
			}

			if err := Rename(dir, tmp, name); (err != nil) != fails {
				t.Errorf("%s: error %v", name, err)
			}

			if _, err := os.Lstat(filepath.Join(dir.Name(), tmp)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: the temporary file still exists: %v", name, err)
			}
		})
	}
}
