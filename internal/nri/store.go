package nri

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/nri/pkg/api"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
	"cri-dockerd/internal/shim/adjustment"
)

// Store holds a file for each container and pod whose plugins have completed, with the adjustments
// of the container. An object that requires plugins and has no file is unfinished: the daemon was
// killed before its plugins had completed. It is safe for concurrent use.
type Store struct {
	dir string

	mu       sync.Mutex // guards complete
	complete map[model.ContainerID]bool
}

// OpenStore reads the names of the files in a directory. Only root may be able to change it. It
// need not exist.
func OpenStore(dir string) (*Store, error) {
	s := &Store{dir: dir, complete: map[model.ContainerID]bool{}}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("NRI: %w", err)
	}

	for _, e := range entries {
		if adjustment.IsID(e.Name()) {
			s.complete[model.ContainerID(e.Name())] = true
		} else if err := os.Remove(filepath.Join(dir, e.Name())); err != nil { // of a killed daemon
			return nil, fmt.Errorf("NRI: %w", err)
		}
	}

	return s, nil
}

// IsUnfinished reports whether an object must not exist for the CRI yet. After a reboot the files
// are lost, and all containers have exited or will never start.
func (s *Store) IsUnfinished(o model.Object) bool {
	switch {
	case o.Sandbox != nil && o.Sandbox.Plugged.Required:
		return (o.Sandbox.Running || o.Sandbox.NeverStarted) && !s.isComplete(o.Sandbox.ID)
	case o.Container != nil && o.Container.Plugged.Required:
		return o.Container.StartedAt.IsZero() && !s.isComplete(o.Container.ID)
	}
	return false
}

func (s *Store) isComplete(id model.ContainerID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.complete[id]
}

// Complete records that the plugins of an object have completed, with the adjustments of a
// container, nil for none. The shim starts the container from here on.
func (s *Store) Complete(id model.ContainerID, a *Adjustment) error {
	m := &api.ContainerAdjustment{}
	if a != nil {
		m = a.message
	}

	b, err := adjustment.Encode(m)
	if err == nil {
		err = os.MkdirAll(s.dir, 0o700)
	}
	if err == nil {
		err = safefs.WriteFile(filepath.Join(s.dir, string(id)), filepath.Join(s.dir, ".new-*"), b, nil)
	}
	if err != nil {
		return fmt.Errorf("record the adjustments of NRI plugins: %w", err)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.complete[id] = true

	return nil
}

// Adjustment reads the adjustments of a container, nil for none.
func (s *Store) Adjustment(id model.ContainerID) (*Adjustment, error) {
	if !s.isComplete(id) {
		return nil, nil
	}

	m, err := adjustment.Read(s.dir, string(id))
	if err != nil || m == nil {
		return nil, err
	}

	return &Adjustment{message: m}, nil
}

// Forget removes the file of an object. An object without a file is no error.
func (s *Store) Forget(id model.ContainerID) error {
	if !s.isComplete(id) {
		return nil
	}
	if err := os.Remove(filepath.Join(s.dir, string(id))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the adjustments of NRI plugins: %w", err)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.complete, id)

	return nil
}

// IDs returns the objects with a file.
func (s *Store) IDs() []model.ContainerID {
	s.mu.Lock()
	defer s.mu.Unlock()

	var out []model.ContainerID
	for id := range s.complete {
		out = append(out, id)
	}

	return out
}
