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

// Bounds of what Complete does within a call. A layer of a container that has just been started is
// small: it takes some 0.1 ms.
const (
	firstSlice = 10 * time.Millisecond  // for one layer
	firstShare = 100 * time.Millisecond // for all of one call
)

// Complete returns the last usage of a store as Read does, and in Writable all of these containers:
// layers that no measurement has found yet are walked now. A layer that is not walked within
// firstSlice is partial. Before the first measurement only At, the directories and Writable are
// set. It returns false if the store's layout is not known.
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

// withFirst adds what earlier calls have walked to the usage, and returns the containers that are
// still missing.
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

	m.first = wanted // others have been measured since, or do not run any more
	if len(wanted) > 0 {
		f.Writable = maps.Clone(f.Writable) // the last usage is shared
		if f.Writable == nil {
			f.Writable = map[model.ContainerID]Usage{}
		}
		maps.Copy(f.Writable, wanted)
	}

	return missing
}

// keepFirst remembers layers that have been walked in full until a measurement finds them.
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
			continue // not as the engine makes layers
		}

		if slice := min(firstSlice, time.Until(until)); slice > 0 {
			_, _ = w.run(nil, slice) // the only error would be that of a check
		}

		out[id] = w.usage()
		w.close()
	}

	return out
}

// layoutOf finds the layers of these containers alone.
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

// overlay2Of is the part of overlay2's layout that these containers write to.
func overlay2Of(root string, containers []model.ContainerID) (l layout, err error) {
	l = layout{images: root, containers: root, writable: map[model.ContainerID]string{}}
	if l.root, err = safefs.OpenDir(filepath.Join(root, overlay2Layers)); err != nil {
		return l, err
	}

	notes, err := safefs.OpenDir(filepath.Join(root, overlay2Mounts))
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil // no container has been created yet
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
