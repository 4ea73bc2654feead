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
)

// entry is a row of the table: which FIFO belongs to which log. Each is a file of its own, written atomically.
type entry struct {
	FIFO      string    `json:"fifo"`
	Container string    `json:"container"` // the engine's ID
	Name      string    `json:"name"`
	Log       target    `json:"log"`
	Began     time.Time `json:"began"`
	// Inode is of the file that is written: after a rename of the log it still is, until Reopen.
	Inode uint64 `json:"inode,omitempty"`
	// Before is of the file that was written until the last Reopen, 0 if there was none. The kubelet may yet rename it back.
	Before uint64 `json:"before,omitempty"`
	// Orphaned is since when the FIFO's engine is gone. The entry then waits for a successor, which brings another FIFO.
	Orphaned time.Time `json:"orphaned,omitzero"`
}

func (e *entry) file(dir string) string { return filepath.Join(dir, filepath.Base(e.FIFO)+".json") }

// keep writes the entry.
func (e *entry) keep(dir string) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	tmp := e.file(dir) + ".new"
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

// readTable reads all entries, the oldest first, and removes what a killed process left half written.
func readTable(dir string) ([]entry, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []entry
	for _, f := range files {
		file := filepath.Join(dir, f.Name())
		if strings.HasSuffix(file, ".new") {
			if err := os.Remove(file); err != nil {
				return nil, err
			}
			continue
		}
		if !strings.HasSuffix(file, ".json") {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var e entry
		if err := json.Unmarshal(b, &e); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b entry) int { return a.Began.Compare(b.Began) })
	return out, nil
}
