package safefs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// tree creates a directory with a file, a nested file, links out of it and a FIFO.
func tree(t *testing.T) *os.File {
	t.Helper()
	root := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside")
	for _, err := range []error{
		os.WriteFile(outside, []byte("secret"), 0o600),
		os.Mkdir(filepath.Join(root, "sub"), 0o700),
		os.WriteFile(filepath.Join(root, "sub/file"), []byte("text"), 0o600),
		os.Symlink(outside, filepath.Join(root, "link")),
		os.Symlink(filepath.Dir(outside), filepath.Join(root, "way")),
		os.Symlink("sub", filepath.Join(root, "inner")),
		unix.Mkfifo(filepath.Join(root, "fifo"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}

	dir, err := OpenDir(root)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { dir.Close() })

	return dir
}

func TestOpenRegular(t *testing.T) {
	dir := tree(t)

	f, err := OpenRegular(dir, "sub/file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	if b, err := ReadAll(f, 4); err != nil || string(b) != "text" {
		t.Errorf("read %q, %v", b, err)
	}

	for name, want := range map[string]error{
		"link":          unix.ELOOP,
		"way/outside":   unix.ELOOP,
		"inner/file":    unix.ELOOP,
		"../x":          unix.EXDEV,
		"/etc/hostname": unix.EXDEV,
		"fifo":          errdefs.ErrFailedPrecondition,
		"sub":           errdefs.ErrFailedPrecondition,
		"missing":       os.ErrNotExist,
	} {
		t.Run(name, func(t *testing.T) {
			if f, err := OpenRegular(dir, name); !errors.Is(err, want) {
				t.Errorf("%s: %v, %v; want %v", name, f, err, want)
			}
		})
	}
}

func TestOpenAtCreates(t *testing.T) {
	dir := tree(t)

	f, err := OpenAt(dir, "sub/new", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	if st, err := f.Stat(); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}

	if _, err := OpenAt(dir, "link", unix.O_CREAT|unix.O_WRONLY, 0o640); !errors.Is(err, unix.ELOOP) {
		t.Errorf("create through a link: error %v, want ELOOP", err)
	}
}

func TestReadFileIsBounded(t *testing.T) {
	dir := tree(t)
	file := filepath.Join(dir.Name(), "sub/file")

	if b, err := ReadFile(file, 4); err != nil || string(b) != "text" {
		t.Errorf("read %q, %v", b, err)
	}

	if _, err := ReadFile(file, 3); !errors.Is(err, ErrTooLarge) {
		t.Errorf("read of a larger file: error %v, want ErrTooLarge", err)
	}

	if _, err := ReadFile(filepath.Join(dir.Name(), "link"), 100); !errors.Is(err, unix.ELOOP) {
		t.Errorf("read of a link: error %v, want ELOOP", err)
	}
}
