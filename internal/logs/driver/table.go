package driver

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
	"cri-dockerd/internal/text"
)

// entry is a row of the table: which FIFO belongs to which log. Each is a file of its own, written
// atomically. An entry comes from newEntry or readTable, which check every field.
type entry struct {
	FIFO      string            `json:"fifo"`
	Container model.ContainerID `json:"container"`
	Name      string            `json:"name"`
	Log       target            `json:"log"`
	Began     time.Time         `json:"began"`
	// Inode is of the file that is written: after a rename of the log it still is, until Reopen.
	Inode uint64 `json:"inode,omitempty"`
	// Before is of the file that was written until the last Reopen, 0 if there was none. The kubelet may yet rename it back.
	Before uint64 `json:"before,omitempty"`
	// Orphaned is since when the FIFO's engine is gone. The entry then waits for a successor, which brings another FIFO.
	Orphaned time.Time `json:"orphaned,omitzero"`
}

// newEntry checks what the engine says of a container whose output begins. Errors name the field.
func (d *Driver) newEntry(fifo string, i info) (entry, error) {
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
	return e, d.check(&e)
}

// check says what is wrong with an entry, which somebody may have written who knows no better.
func (d *Driver) check(e *entry) error {
	if err := d.checkFIFO(e.FIFO); err != nil {
		return err
	}
	if _, err := model.ParseContainerID(string(e.Container)); err != nil {
		return err
	}
	e.Name = text.Clean(e.Name, text.MaxName)
	return e.Log.check()
}

// maxFIFOName is longer than the names of Docker's FIFOs, which are 64 hexadecimal digits.
const maxFIFOName = 128

// checkFIFO says whether a path is of Docker's directory of FIFOs, so that its name is fit for files
// of the table and the file may be removed.
func (d *Driver) checkFIFO(path string) error {
	dir, name := filepath.Split(path)
	if dir != d.cfg.FIFOs+"/" {
		return fmt.Errorf("File %q: it must be a FIFO in %s", text.Clean(path, text.MaxName), d.cfg.FIFOs)
	}
	valid := name != "" && len(name) <= maxFIFOName && name[0] != '.'
	for _, c := range []byte(name) {
		valid = valid && (c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_' || c == '.')
	}
	if !valid {
		return fmt.Errorf("File %q: the FIFO's name must be at most %d letters, digits, '-', '_' and '.'", text.Clean(path, text.MaxName), maxFIFOName)
	}
	return nil
}

const (
	entrySuffix  = ".json"
	newSuffix    = ".new"    // of an entry that is being written
	brokenSuffix = ".broken" // of an entry that was set aside
)

func (e *entry) file(dir string) string { return filepath.Join(dir, filepath.Base(e.FIFO)+entrySuffix) }

func (e *entry) spillFile(dir string) string {
	return filepath.Join(dir, filepath.Base(e.FIFO)+spillSuffix)
}

// keep writes the entry. The directory is root's alone.
func (e *entry) keep(dir string) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	tmp := e.file(dir) + newSuffix
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("log-driver's table: %w", err)
	}
	if err := os.Rename(tmp, e.file(dir)); err != nil {
		return errors.Join(fmt.Errorf("log-driver's table: %w", err), os.Remove(tmp))
	}
	return nil
}

// forget removes the entry.
func (e *entry) forget(dir string) error {
	if err := os.Remove(e.file(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("log-driver's table: %w", err)
	}
	return nil
}

// maxEntry bounds a file of the table, in bytes. Paths are at most 4 KiB, and JSON may need six bytes
// for one.
const maxEntry = 64 << 10

// readTable reads all entries, the oldest first. It removes what a killed process left half written,
// and sets aside a file that is none of ours or was torn by a loss of power: that container's output
// is not taken up, all others' is.
func (d *Driver) readTable() ([]entry, error) {
	files, err := os.ReadDir(d.cfg.Directory)
	if err != nil {
		return nil, err
	}
	var out []entry
	for _, f := range files {
		file := filepath.Join(d.cfg.Directory, f.Name())
		switch {
		case strings.HasSuffix(file, newSuffix):
			if err := os.Remove(file); err != nil {
				d.setAside(file, notWritten, err)
			}
		case strings.HasSuffix(file, spillSuffix):
			d.removeStray(file)
		case strings.HasSuffix(file, entrySuffix):
			e, err := d.readEntry(file)
			if err != nil {
				d.setAside(file, notWritten, err)
				continue
			}
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b entry) int { return a.Began.Compare(b.Began) })
	return out, nil
}

func (d *Driver) readEntry(file string) (e entry, err error) {
	b, err := safefs.ReadFile(file, maxEntry)
	if err != nil {
		return e, err
	}
	if err := json.Unmarshal(b, &e); err != nil {
		return e, err
	}
	if err := d.check(&e); err != nil {
		return e, err
	}
	if e.file(d.cfg.Directory) != file {
		return e, fmt.Errorf("it is of the FIFO %s", e.FIFO)
	}
	return e, nil
}

// notWritten is what it means that an entry is set aside.
const notWritten = "its container's output is not written until the container restarts"

// setAside renames a file that cannot be used, so that the next start does not meet it again.
// effect says what that means.
func (d *Driver) setAside(file, effect string, why error) {
	aside := file + brokenSuffix
	err := os.Rename(file, aside)
	d.cfg.Log.Error("a file of the log-driver's table is set aside; "+effect, "file", aside, "err", errors.Join(why, err))
	d.alarms.raise(alarmTable)
}

// removeStray removes the beginning of a frame that belongs to no entry.
func (d *Driver) removeStray(part string) {
	_, err := os.Lstat(strings.TrimSuffix(part, spillSuffix) + entrySuffix)
	if errors.Is(err, os.ErrNotExist) {
		err = os.Remove(part)
	}
	if err != nil {
		d.cfg.Log.Warn("the beginning of a frame is left", "file", part, "err", err)
	}
}
