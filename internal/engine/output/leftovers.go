package output

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Leftovers are the outputs of commands whose session was lost with an earlier process. They would
// block if nobody read them.
type Leftovers struct{ pipes []*pipe }

// FindLeftovers opens the FIFOs in dir. It must run before the first Open of this process. The
// error names those that could not be opened.
func FindLeftovers(dir string) (*Leftovers, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return &Leftovers{}, nil // there was no session yet
	}

	errs := []error{err}
	l := &Leftovers{}
	for _, entry := range entries {
		p := &pipe{path: filepath.Join(dir, entry.Name())}
		if p.read, err = os.OpenFile(p.path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			errs = append(errs, err)
			continue
		}
		l.pipes = append(l.pipes, p)
	}

	return l, errors.Join(errs...)
}

// Discard reads all outputs to their ends. If ctx ends first, the next process continues.
func (l *Leftovers) Discard(ctx context.Context, copyAll CopyFunc) {
	var readers sync.WaitGroup
	for _, p := range l.pipes {
		readers.Go(func() {
			defer p.read.Close()

			stop := context.AfterFunc(ctx, func() { _ = p.read.SetReadDeadline(time.Now()) })
			defer stop()

			if copyAll(io.Discard, p) == nil {
				p.remove()
			}
		})
	}

	readers.Wait()
}
