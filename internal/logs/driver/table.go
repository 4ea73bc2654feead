package driver

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
	"cri-dockerd/internal/text"
)

// entry is a row of the table: a FIFO and its log. Each entry is a file, written atomically.
// Entries come from newEntry or table.read, and both check every field.
type entry struct {
	FIFO      string            `json:"fifo"`
	Container model.ContainerID `json:"container"`
	Name      string            `json:"name"`
	Log       target            `json:"log"`
	Began     time.Time         `json:"began"`
	// Inode is the inode of the current file. After a rename of the log it stays in use until
	// Reopen.
	Inode uint64 `json:"inode,omitempty"`
	// Before is the inode of the file in use before the last Reopen, or 0. The kubelet may still
	// rename it back.
	Before uint64 `json:"before,omitempty"`
	// Orphaned is the time at which the FIFO's engine ended. The entry then waits for the engine's
	// successor, which creates another FIFO.
	Orphaned time.Time `json:"orphaned,omitzero"`
}

// table is the directory with a file for each FIFO. A new process continues from it. Only root has
// access.
type table struct {
	dir    string
	fifos  string // the directory of Docker's FIFOs
	logger *slog.Logger
	alarms *alarms
}

// newEntry validates the engine's description of a starting container. Errors name the field.
func (t *table) newEntry(fifo string, i info) (entry, error) {
	id, err := model.ParseContainerID(i.ContainerID)
	if err != nil {
		return entry{}, fmt.Errorf("Info.ContainerID: %w", err)
	}

	e := entry{
		FIFO:      fifo,
		Container: id,
		Name:      text.Clean(i.ContainerName, text.MaxName),
		Log:       i.target(),
		Began:     time.Now(),
	}

	return e, t.check(&e)
}

// check validates an entry from outside, and cleans its name.
func (t *table) check(e *entry) error {
	if err := t.checkFIFO(e.FIFO); err != nil {
		return err
	}

	if _, err := model.ParseContainerID(string(e.Container)); err != nil {
		return err
	}

	e.Name = text.Clean(e.Name, text.MaxName)

	return e.Log.check()
}

// maxFIFOName exceeds the length of Docker's FIFO names, 64 hexadecimal digits.
const maxFIFOName = 128

// checkFIFO verifies that a path is in Docker's directory of FIFOs. Then its name is suitable for
// files of the table, and the file may be removed.
func (t *table) checkFIFO(path string) error {
	dir, name := filepath.Split(path)
	if dir != t.fifos+"/" {
		return fmt.Errorf("field File: %q: must be a FIFO in %s", text.Clean(path, text.MaxName), t.fifos)
	}

	if name == "" || len(name) > maxFIFOName || name[0] == '.' || strings.ContainsFunc(name, isInvalidInName) {
		return fmt.Errorf("field File: %q: the FIFO's name must have at most %d letters, digits, '-', '_' and '.'",
			text.Clean(path, text.MaxName), maxFIFOName)
	}

	return nil
}

func isInvalidInName(c rune) bool {
	isAlnum := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
	return !isAlnum && c != '-' && c != '_' && c != '.'
}

// openFIFO opens a FIFO of the engine. It must be in the engine's directory, and neither a link nor
// another type of file.
func (t *table) openFIFO(path string) (fd int, err error) {
	if err := t.checkFIFO(path); err != nil {
		return 0, err
	}

	fd, err = unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open Docker's FIFO %s: %w", path, err)
	}

	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFIFO {
		err = errors.New("not a FIFO")
	}

	if err != nil {
		return 0, errors.Join(fmt.Errorf("open Docker's FIFO %s: %w", path, err), unix.Close(fd))
	}

	return fd, nil
}

// removeFIFO removes the FIFO of a dead engine. The engine's successor creates another one.
func (t *table) removeFIFO(path string) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.logger.Warn("cannot remove the FIFO of a dead engine", "fifo", path, "err", err)
	}
}

const (
	entrySuffix  = ".json"
	newSuffix    = ".new"    // of an entry in progress
	brokenSuffix = ".broken" // of an entry set aside
)

func (t *table) entryFile(e *entry) string {
	return filepath.Join(t.dir, filepath.Base(e.FIFO)+entrySuffix)
}

func (t *table) spillFile(e *entry) string {
	return filepath.Join(t.dir, filepath.Base(e.FIFO)+spillSuffix)
}

// save writes an entry.
func (t *table) save(e *entry) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}

	file := t.entryFile(e)
	if err := safefs.WriteFile(file, file+".*"+newSuffix, b, nil); err != nil {
		return fmt.Errorf("log-driver's table: %w", err)
	}

	return nil
}

// forget removes an entry and its spill.
func (t *table) forget(e *entry) {
	err := errors.Join(removeExisting(t.spillFile(e)), removeExisting(t.entryFile(e)))
	if err != nil {
		t.logger.Warn("cannot remove an entry of the log-driver's table", "container", e.Name, "err", err)
	}
}

// removeExisting removes a file of the table. A missing file is not an error.
func removeExisting(file string) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("log-driver's table: %w", err)
	}
	return nil
}

// maxEntry limits a file of the table, in bytes. Paths have at most 4 KiB, and JSON may need six
// bytes for one.
const maxEntry = 64 << 10

// read reads all entries, oldest first. It removes incomplete files of a killed process. It sets
// aside foreign files and files damaged by a power failure: that container's output is not resumed,
// but all others are.
func (t *table) read() ([]entry, error) {
	files, err := os.ReadDir(t.dir)
	if err != nil {
		return nil, err
	}

	var out []entry
	for _, f := range files {
		file := filepath.Join(t.dir, f.Name())
		switch {
		case strings.HasSuffix(file, newSuffix):
			if err := os.Remove(file); err != nil {
				t.setAside(file, notWritten, err)
			}

		case strings.HasSuffix(file, spillSuffix):
			t.removeStray(file)
		case strings.HasSuffix(file, entrySuffix):
			e, err := t.readEntry(file)
			if err != nil {
				t.setAside(file, notWritten, err)
				continue
			}
			out = append(out, e)
		}
	}

	slices.SortFunc(out, func(a, b entry) int { return a.Began.Compare(b.Began) })

	return out, nil
}

func (t *table) readEntry(file string) (e entry, err error) {
	b, err := safefs.ReadFile(file, maxEntry)
	if err != nil {
		return e, err
	}

	if err := json.Unmarshal(b, &e); err != nil {
		return e, err
	}

	if err := t.check(&e); err != nil {
		return e, err
	}

	if t.entryFile(&e) != file {
		return e, fmt.Errorf("it belongs to FIFO %s", e.FIFO)
	}

	return e, nil
}

// openSpill returns the spill of an entry. It sets aside an unusable file, and thereby drops the
// partial frame. Only a lack of descriptors or memory is an error.
func (t *table) openSpill(e *entry) (*spill, error) {
	path := t.spillFile(e)
	s, err := openSpill(path)
	if err == nil || isShortage(err) || errors.Is(err, unix.ENOMEM) {
		return s, err
	}
	t.setAside(path, "a piece of its container's output is lost", err)
	return &spill{path: path}, nil
}

// notWritten is the consequence of an entry set aside.
const notWritten = "its container's output is not written until the container restarts"

// setAside renames an unusable file, so that the next start ignores it. effect describes the
// consequence.
func (t *table) setAside(file, effect string, cause error) {
	aside := file + brokenSuffix
	err := errors.Join(cause, os.Rename(file, aside))
	t.logger.Error("set aside a damaged file of the log-driver's table; "+effect, "file", aside, "err", err)
	t.alarms.raise(alarmTable)
}

// removeStray removes a partial frame without an entry.
func (t *table) removeStray(part string) {
	_, err := os.Lstat(strings.TrimSuffix(part, spillSuffix) + entrySuffix)
	if errors.Is(err, os.ErrNotExist) {
		err = os.Remove(part)
	}
	if err != nil {
		t.logger.Warn("cannot remove a partial frame", "file", part, "err", err)
	}
}
