package safefs

import (
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// CreateFile atomically creates or replaces the file at path with content b. It writes a temporary
// file and renames it. temporary is the temporary file's directory and pattern (os.CreateTemp).
// prepare, if not nil, receives the file before the rename. The file has mode 0600 and stays open.
// All directories must belong to root.
func CreateFile(path, temporary string, b []byte, prepare func(*os.File) error) (*os.File, error) {
	f, err := os.CreateTemp(filepath.Split(temporary))
	if err != nil {
		return nil, err
	}

	_, err = f.Write(b)
	if err == nil && prepare != nil {
		err = prepare(f)
	}

	if err == nil {
		err = os.Rename(f.Name(), path)
	}

	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}

	return f, nil
}

// WriteFile does the same as CreateFile and closes the file.
func WriteFile(path, temporary string, b []byte, prepare func(*os.File) error) error {
	f, err := CreateFile(path, temporary, b, prepare)
	if err != nil {
		return err
	}
	return f.Close()
}

// TemporaryName returns an unguessable name for Rename. It starts with a dot, so it never collides
// with a log's name.
func TemporaryName() string { return "." + rand.Text() + ".new" }

// Rename renames the temporary file tmp to name, both in dir. It removes tmp on error.
func Rename(dir *os.File, tmp, name string) error {
	fd := int(dir.Fd())
	if err := unix.Renameat(fd, tmp, fd, name); err != nil {
		err = &os.LinkError{Op: "rename", Old: tmp, New: filepath.Join(dir.Name(), name), Err: err}
		return errors.Join(err, unix.Unlinkat(fd, tmp, 0))
	}
	return nil
}
