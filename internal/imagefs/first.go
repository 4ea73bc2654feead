package imagefs

import (
	"errors"
	"io/fs"
	"maps"
	"path/filepath"
	"time"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// Time limits of Complete within a call. The layer of a newly started container is small and takes
// about 0.1 ms.
const (
	firstSlice = 10 * time.Millisecond  // for one layer
	firstShare = 100 * time.Millisecond // for all layers of one call
)

// Complete returns the last usage of a store, like Read, and includes all of these containers in
// Writable. It walks layers without a measurement immediately. A layer exceeding firstSlice is
// partial. Before the first measurement only At, the directories and Writable are set. It returns
// false if the store's layout is unknown.
func (m *Meter) Complete(s Store, containers []model.ContainerID) (Measurement, bool) {
	f, known := m.Read(s)
	missing := m.withFirst(&f, s, containers)
	if known && len(missing) == 0 {
		return f, true
	}

	l, err := m.layoutOf(s, missing)
	defer l.close()

	if err != nil {
		return f, known
	}

	if !known {
		f.At, f.ImageDir, f.ContainerDir = time.Now(), l.images, l.containers
	}

	walked := walkFirst(l, missing)
	m.keepFirst(s, walked)
	if f.Writable = maps.Clone(f.Writable); f.Writable == nil {
		f.Writable = map[model.ContainerID]Usage{}
	}

	maps.Copy(f.Writable, walked)

	return f, true
}

// withFirst adds the results of earlier walks to the usage, and returns the remaining containers.
func (m *Meter) withFirst(f *Measurement, s Store, containers []model.ContainerID) (missing []model.ContainerID) {
	m.mu.Lock()
	defer m.mu.Unlock()

	if m.firstOf != s {
		m.firstOf, m.first = s, nil
	}

	wanted := map[model.ContainerID]Usage{}
	for _, id := range containers {
		if _, measured := f.Writable[id]; measured {
			continue
		}

		if u, ok := m.first[id]; ok {
			wanted[id] = u
		} else {
			missing = append(missing, id)
		}
	}

	m.first = wanted // drops containers measured since then and stopped ones
	if len(wanted) > 0 {
		f.Writable = maps.Clone(f.Writable) // the last usage is shared
		if f.Writable == nil {
			f.Writable = map[model.ContainerID]Usage{}
		}
		maps.Copy(f.Writable, wanted)
	}

	return missing
}

// keepFirst stores completely walked layers until a measurement includes them.
func (m *Meter) keepFirst(s Store, walked map[model.ContainerID]Usage) {
	m.mu.Lock()
	defer m.mu.Unlock()

	if m.firstOf != s {
		return
	}

	for id, u := range walked {
		if !u.Partial {
			m.first[id] = u
		}
	}
}

// walkFirst walks the layers of these containers.
func walkFirst(l layout, containers []model.ContainerID) map[model.ContainerID]Usage {
	out := map[model.ContainerID]Usage{}
	until := time.Now().Add(firstShare)
	for _, id := range containers {
		name, ok := l.writable[id]
		if !ok {
			continue
		}

		w, err := newWalk(l.root, name)
		if err != nil {
			continue // not a layer in the engine's format
		}

		if slice := min(firstSlice, time.Until(until)); slice > 0 {
			_, _ = w.run(nil, slice) // errors come only from check, which is nil
		}

		out[id] = w.usage()
		w.close()
	}

	return out
}

// layoutOf returns the layers of these containers only.
func (m *Meter) layoutOf(s Store, containers []model.ContainerID) (layout, error) {
	switch {
	case s.Containerd && s.Driver == "overlayfs":
		mounts, err := m.readMounts()
		if err != nil {
			return layout{}, err
		}
		l, upper, err := containerdRoot(s.Root, mounts)
		if err != nil {
			return l, err
		}
		for _, id := range containers {
			if n, ok := upper[id]; ok {
				l.writable[id] = snapshot(n)
			}
		}
		return l, nil

	case s.Driver == "overlay2":
		return overlay2Of(s.Root, containers)
	}

	return layout{}, errUnknownLayout(s)
}

// overlay2Of returns the part of overlay2's layout with the writable layers of these containers.
func overlay2Of(root string, containers []model.ContainerID) (l layout, err error) {
	l = layout{images: root, containers: root, writable: map[model.ContainerID]string{}}
	if l.root, err = safefs.OpenDir(filepath.Join(root, overlay2Layers)); err != nil {
		return l, err
	}

	notes, err := safefs.OpenDir(filepath.Join(root, overlay2Mounts))
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil // no container was created yet
	}

	if err != nil {
		return l, err
	}
	defer notes.Close()

	for _, id := range containers {
		if mount := mountID(notes, id); mount != "" {
			l.writable[id] = filepath.Join(mount, "diff")
		}
	}

	return l, nil
}
