// Package imagefs measures what images and the writable layers of containers take of the file
// systems that Docker keeps them in. It walks their directories beside the calls that ask for the
// result: the layers of images once, since they never change, those of containers again and again
// within a budget.
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

// Measurement is what one walk over a store found.
type Measurement struct {
	At                     time.Time
	Image, Container       Usage
	ImageDir, ContainerDir string                      // on the file systems that they are on; equal if it is one
	Writable               map[model.ContainerID]Usage // the writable layer of each container
}

const (
	fresh = 10 * time.Second // a younger measurement is not repeated
	// after a measurement it rests for so many times as long: at most 5 % of a core
	rest = 20

	// A layer that is not walked within walkSlice is slow. Slow layers together take slowShare of a
	// measurement and go on in the next one, so that none of them delays the others.
	walkSlice = 200 * time.Millisecond
	slowShare = time.Second
	// maxPaused bounds the walks that are under way between measurements. Each holds up to 18
	// descriptors.
	maxPaused = 32
)

// state is what is known of a layer.
type state struct {
	usage   Usage // of the last walk that ended, or more, if the one under way has counted more
	known   bool  // a walk has ended
	final   bool  // two walks agree: the engine may have been writing the layer during the first
	slow    bool
	walk    *walk // under way, nil for none
	partial bool  // it was logged that the layer is too large
}

// Meter measures one store. It is safe for concurrent use.
type Meter struct {
	log    *slog.Logger
	mounts string // the file of this process's mounts
	asked  chan Store
	slice  time.Duration // walkSlice, but in tests

	mu      sync.Mutex // guards the rest
	last    *Measurement
	of      Store
	first   map[model.ContainerID]Usage // layers that no measurement has found yet; see Complete
	firstOf Store

	// Used by Run only.
	layers     map[string]*state            // by directory
	turn       int                          // the slow layer that is next
	mountIDs   map[model.ContainerID]string // Docker's names of the containers' layers
	containers map[string]bool              // containerd's snapshots of containers
	failed     string                       // what was logged last
}

// New returns a meter that measures when Run runs.
func New(log *slog.Logger) *Meter {
	return &Meter{
		log:        log,
		mounts:     "/proc/self/mountinfo",
		asked:      make(chan Store, 1),
		slice:      walkSlice,
		layers:     map[string]*state{},
		mountIDs:   map[model.ContainerID]string{},
		containers: map[string]bool{},
	}
}

// Read returns the last usage of a store, false while there are none, and has new ones measured
// if they are old. It does no work itself.
func (m *Meter) Read(s Store) (Measurement, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()

	known := m.last != nil && m.of == s
	if !known || time.Since(m.last.At) > fresh {
		select {
		case m.asked <- s:
		default:
		}
	}

	if !known {
		return Measurement{}, false
	}

	return *m.last, true
}

// Run measures what is asked for until ctx ends.
func (m *Meter) Run(ctx context.Context) {
	defer m.forget(nil)

	for {
		var s Store
		select {
		case <-ctx.Done():
			return
		case s = <-m.asked:
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
			m.log.Debug("the disk usage of images is not measured; their sizes are added up instead", "err", err)
		}

		pause := time.NewTimer(rest * time.Since(began))
		select {
		case <-ctx.Done():
		case <-pause.C:
		}

		pause.Stop()
	}
}

// readMounts reads the mounts of this process.
func (m *Meter) readMounts() ([]byte, error) { return os.ReadFile(m.mounts) }

// layout finds the layers of a store.
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
	return fmt.Errorf("storage driver %s: its layout is not known", s.Driver)
}

// measure walks what is new and what may have changed.
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

// advance walks a layer for a slice of time, unless it has not changed.
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
		m.log.Warn("a layer is too large to be measured in full, or changes too fast",
			"layer", l.path(d.name), "bytes", u.Bytes, "inodes", u.Inodes)
	}

	return nil
}

// paused is how many walks are under way.
func (m *Meter) paused() (n int) {
	for _, st := range m.layers {
		if st.walk != nil {
			n++
		}
	}
	return n
}

// forget drops what is known of layers that are not present any more.
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

// sum adds up what is known of the layers.
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
