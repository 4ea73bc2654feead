// Package imagefs measures what images and the writable layers of containers take of the file systems that Docker keeps them in. It walks
// their directories beside the calls that ask for the figures: the layers of images once, since they never change, those of containers again
// and again within a budget.
package imagefs

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Figures are one measurement.
type Figures struct {
	At                     time.Time
	Image, Container       Usage
	ImageDir, ContainerDir string           // on the file systems that they are on; equal if it is one
	Writable               map[string]Usage // of each container's layers, by directory
}

const (
	fresh = 10 * time.Second // figures that are younger are not measured anew
	rest  = 20               // after a measurement it rests for so many times as long: at most 5 % of a core
)

// measured is a layer that does not change. It is final when two measurements agree: the engine may have been writing it during the first.
type measured struct {
	Usage
	final bool
}

// Meter measures one store. It is safe for concurrent use.
type Meter struct {
	log    *slog.Logger
	mounts string // the file of this process's mounts
	asked  chan Store

	mu   sync.Mutex // guards the rest
	last *Figures
	of   Store

	// Used by Run only.
	layers   map[string]measured // that do not change, by directory
	writable map[string]bool
	failed   string // what was logged last
}

// New returns a meter that measures when Run runs.
func New(log *slog.Logger) *Meter {
	return &Meter{log: log, mounts: "/proc/self/mountinfo", asked: make(chan Store, 1), layers: map[string]measured{}, writable: map[string]bool{}}
}

// Read returns the last figures of a store, false while there are none, and has new ones measured if they are old. It does no work itself.
func (m *Meter) Read(s Store) (Figures, bool) {
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
		return Figures{}, false
	}
	return *m.last, true
}

// Run measures what is asked for until ctx ends.
func (m *Meter) Run(ctx context.Context) {
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

// measure walks what is new and what may have changed.
func (m *Meter) measure(ctx context.Context, s Store) (Figures, error) {
	var l layout
	var err error
	switch {
	case s.Containerd && s.Driver == "overlayfs":
		var mounts []byte
		if mounts, err = os.ReadFile(m.mounts); err == nil {
			l, err = containerd(s.Root, mounts, m.writable)
		}
	case s.Driver == "overlay2":
		l, err = overlay2(s.Root)
	default:
		err = fmt.Errorf("storage driver %s: its layout is not known", s.Driver)
	}
	if err != nil {
		return Figures{}, err
	}
	f := Figures{ImageDir: l.images, ContainerDir: l.containers, Writable: map[string]Usage{}}
	layers := make(map[string]measured, len(l.layers))
	for _, d := range l.layers {
		old, known := m.layers[d.dir]
		now := old
		if !old.final || !d.final {
			u, err := usage(ctx, d.dir)
			if err != nil {
				return Figures{}, err
			}
			now = measured{Usage: u, final: known && u == old.Usage}
		}
		if d.final {
			layers[d.dir] = now
		}
		if d.container {
			f.Container.add(now.Usage)
		} else {
			f.Image.add(now.Usage)
		}
		if !d.final {
			f.Writable[d.dir] = now.Usage
		}
	}
	m.layers, f.At = layers, time.Now()
	return f, nil
}
