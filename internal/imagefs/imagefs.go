// Package imagefs measures the disk usage of images and of the writable layers of containers. It
// walks their directories in the background. Image layers are walked once, since they never change.
// Writable layers are walked repeatedly within a time budget.
package imagefs

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"cri-dockerd/internal/model"
)

// Measurement is the result of one walk over a store.
type Measurement struct {
	At               time.Time
	Image, Container Usage
	// ImageDir and ContainerDir are directories on the file systems of images and of containers.
	// They are equal if these share one file system.
	ImageDir, ContainerDir string
	Writable               map[model.ContainerID]Usage // the writable layer of each container
}

const (
	maxAge = 10 * time.Second // of a measurement before it is repeated
	// pauseFactor is the pause after a measurement, as a multiple of its duration. It limits the
	// load to one twentieth of a core.
	pauseFactor = 20

	// A layer exceeding walkSlice is slow. Slow layers share slowShare of each measurement and
	// continue in the next one, so that they do not delay others.
	walkSlice = 200 * time.Millisecond
	slowShare = time.Second
	// maxPaused limits the number of unfinished walks between measurements. Each holds up to 18
	// descriptors.
	maxPaused = 32
)

// state is the walk and usage of a layer.
type state struct {
	usage   Usage // of the last complete walk, or of the current one if it has counted more
	known   bool  // a walk is complete
	final   bool  // two walks agree; during the first the engine may still have been writing
	slow    bool
	walk    *walk // unfinished walk, nil for none
	partial bool  // the warning about the size of the layer was logged
}

// Meter measures one store. It is safe for concurrent use.
type Meter struct {
	log      *slog.Logger
	mounts   string // mountinfo of this process
	requests chan Store
	slice    time.Duration // walkSlice, except in tests

	mu      sync.Mutex // guards the fields below
	last    *Measurement
	of      Store
	first   map[model.ContainerID]Usage // layers without a measurement; see Complete
	firstOf Store

	// Used by Run only.
	layers     map[string]*state            // by directory
	turn       int                          // index of the next slow layer
	mountIDs   map[model.ContainerID]string // Docker's names of the containers' layers
	containers map[string]bool              // containerd's snapshots of containers
	failed     string                       // the last logged error
}

// New returns a Meter. It measures while Run runs.
func New(log *slog.Logger) *Meter {
	return &Meter{
		log:        log,
		mounts:     "/proc/self/mountinfo",
		requests:   make(chan Store, 1),
		slice:      walkSlice,
		layers:     map[string]*state{},
		mountIDs:   map[model.ContainerID]string{},
		containers: map[string]bool{},
	}
}

// Read returns the last usage of a store, false if there is none, and requests a new measurement if
// it is old. It does not measure itself.
func (m *Meter) Read(s Store) (Measurement, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()

	known := m.last != nil && m.of == s
	if !known || time.Since(m.last.At) > maxAge {
		select {
		case m.requests <- s:
		default:
		}
	}

	if !known {
		return Measurement{}, false
	}

	return *m.last, true
}

// Run performs requested measurements until ctx ends.
func (m *Meter) Run(ctx context.Context) {
	defer m.forget(nil)

	for {
		var s Store
		select {
		case <-ctx.Done():
			return
		case s = <-m.requests:
		}

		began := time.Now()
		f, err := m.measure(ctx, s)
		if err == nil {
			m.mu.Lock()
			m.last, m.of = &f, s
			m.mu.Unlock()
			m.failed = ""
		} else if err.Error() != m.failed {
			m.failed = err.Error()
			m.log.Debug("cannot measure the disk usage of images; using the sum of their sizes", "err", err)
		}

		pause := time.NewTimer(pauseFactor * time.Since(began))
		select {
		case <-ctx.Done():
		case <-pause.C:
		}

		pause.Stop()
	}
}

// readMounts reads the mounts of this process.
func (m *Meter) readMounts() ([]byte, error) { return os.ReadFile(m.mounts) }

// layout returns the layers of a store.
func (m *Meter) layout(s Store) (layout, error) {
	switch {
	case s.Containerd && s.Driver == "overlayfs":
		mounts, err := m.readMounts()
		if err != nil {
			return layout{}, err
		}
		return containerd(s.Root, mounts, m.containers)

	case s.Driver == "overlay2":
		return overlay2(s.Root, m.mountIDs)
	}

	return layout{}, errUnknownLayout(s)
}

func errUnknownLayout(s Store) error {
	return fmt.Errorf("storage driver %s: unknown layout", s.Driver)
}

// measure walks the new and possibly changed layers.
func (m *Meter) measure(ctx context.Context, s Store) (Measurement, error) {
	l, err := m.layout(s)
	defer l.close()

	if err != nil {
		return Measurement{}, err
	}

	present := make(map[string]bool, len(l.layers))
	var slow []layer
	for _, d := range l.layers {
		dir := l.path(d.name)
		present[dir] = true
		st := m.layers[dir]
		if st == nil {
			st = &state{}
			m.layers[dir] = st
		}

		if st.slow {
			slow = append(slow, d)
		} else if err := m.advance(ctx, l, d, st); err != nil {
			return Measurement{}, err
		}
	}

	m.forget(present)
	if err := m.advanceSlow(ctx, l, slow); err != nil {
		return Measurement{}, err
	}

	return m.sum(l), nil
}

// advanceSlow walks the slow layers in turn for slowShare.
func (m *Meter) advanceSlow(ctx context.Context, l layout, slow []layer) error {
	began := time.Now()
	for i := 0; i < len(slow) && time.Since(began) < slowShare; i++ {
		d := slow[m.turn%len(slow)]
		m.turn++
		if err := m.advance(ctx, l, d, m.layers[l.path(d.name)]); err != nil {
			return err
		}
	}

	return nil
}

// advance walks a layer for a slice of time, unless it is unchanged.
func (m *Meter) advance(ctx context.Context, l layout, d layer, st *state) (err error) {
	if st.final && d.final {
		return nil
	}

	if st.walk == nil {
		if st.slow && m.paused() >= maxPaused {
			return nil
		}
		if st.walk, err = newWalk(l.root, d.name); err != nil {
			st.walk = nil
			return nil //nolint:nilerr // not as the engine makes layers; what was counted before stays
		}
	}

	ended, err := st.walk.run(ctx.Err, m.slice)
	if err != nil {
		return err
	}

	u := st.walk.usage()
	if !ended {
		st.slow = true
		if !st.known || u.Bytes > st.usage.Bytes || u.Inodes > st.usage.Inodes {
			st.usage = u
		}

		if m.paused() > maxPaused {
			st.walk.close()
			st.walk = nil
		}

		return nil
	}

	st.final = d.final && (u.Partial || st.known && u == st.usage)
	st.slow = st.walk.spent > m.slice
	st.usage, st.known, st.walk = u, true, nil
	if u.Partial && !st.partial {
		st.partial = true
		m.log.Warn("layer usage is incomplete: the layer is too large or changes too fast",
			"layer", l.path(d.name), "bytes", u.Bytes, "inodes", u.Inodes)
	}

	return nil
}

// paused returns the number of unfinished walks.
func (m *Meter) paused() (n int) {
	for _, st := range m.layers {
		if st.walk != nil {
			n++
		}
	}
	return n
}

// forget drops the state of layers not in present.
func (m *Meter) forget(present map[string]bool) {
	for dir, st := range m.layers {
		if present[dir] {
			continue
		}
		if st.walk != nil {
			st.walk.close()
		}
		delete(m.layers, dir)
	}
}

// sum adds up the usage of the layers.
func (m *Meter) sum(l layout) Measurement {
	f := Measurement{
		At:           time.Now(),
		ImageDir:     l.images,
		ContainerDir: l.containers,
		Writable:     make(map[model.ContainerID]Usage, len(l.writable)),
	}

	for _, d := range l.layers {
		u := m.layers[l.path(d.name)].usage
		if d.container {
			f.Container.add(u)
		} else {
			f.Image.add(u)
		}
	}

	for id, name := range l.writable {
		if st := m.layers[l.path(name)]; st != nil {
			f.Writable[id] = st.usage
		}
	}

	return f
}
