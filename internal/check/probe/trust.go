package probe

import (
	"errors"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/rootonly"
	"cri-dockerd/internal/safefs"
)

// Bounds of what is read. Units and configurations of real nodes have some kilobytes.
const (
	maxFile  = 1 << 20 // bytes of a file
	maxFiles = 256     // files of a directory
)

// trusted reads a file of at most maxFile bytes that only root can change. One that others can
// change is noted for the finding file-owner.
func (p *Prober) trusted(file string) ([]byte, error) {
	f, err := p.open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return safefs.ReadAll(f, maxFile)
}

// open is rootonly.Open, which notes what others can change.
func (p *Prober) open(file string) (*os.File, error) {
	f, err := rootonly.Open(p.root, file)
	if e := (*rootonly.FileError)(nil); errors.As(err, &e) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if u := finding.Untrusted(*e); !slices.Contains(p.untrusted, u) && len(p.untrusted) < maxFiles {
			p.untrusted = append(p.untrusted, u)
		}
	}

	return f, err
}

// kernel is the content of a file of the kernel's without space around, "" if it cannot be read.
func (p *Prober) kernel(file string) string {
	f, err := os.OpenFile(p.path(file), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer f.Close()

	b, err := io.ReadAll(io.LimitReader(f, 16*maxFile))
	if err != nil {
		return ""
	}

	return strings.TrimSpace(string(b))
}
