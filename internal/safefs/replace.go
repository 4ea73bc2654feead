package safefs

import (
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// CreateFile puts a new file with content b at path in one step, so that it is whole or not there.
// It writes a temporary file and renames it. temporary is that file's pattern as of os.CreateTemp,
// with its directory. prepare, if not nil, gets the file before the rename. The file has mode 0600
// and stays open. All directories must be root's.
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

// WriteFile is CreateFile, and closes the file.
func WriteFile(path, temporary string, b []byte, prepare func(*os.File) error) error {
	f, err := CreateFile(path, temporary, b, prepare)
	if err != nil {
		return err
	}
	return f.Close()
}

// TemporaryName returns a name that nobody can guess, for Rename. It begins with a dot, so it is no
// name of a log.
func TemporaryName() string { return "." + rand.Text() + ".new" }

// Rename gives the temporary file tmp its name, both in dir. On error it removes the file.
func Rename(dir *os.File, tmp, name string) error {
	fd := int(dir.Fd())
	if err := unix.Renameat(fd, tmp, fd, name); err != nil {
		err = &os.LinkError{Op: "rename", Old: tmp, New: filepath.Join(dir.Name(), name), Err: err}
		return errors.Join(err, unix.Unlinkat(fd, tmp, 0))
	}
	return nil
}
