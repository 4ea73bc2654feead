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

// Limits for reading files. Units and configurations of real nodes have a few kilobytes.
const (
	maxFile  = 1 << 20 // bytes of a file
	maxFiles = 256     // files of a directory
)

// trusted reads a file of at most maxFile bytes if only root can change it. It records other files
// for the finding file-owner.
func (p *Prober) trusted(file string) ([]byte, error) {
	f, err := p.open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return safefs.ReadAll(f, maxFile)
}

// open calls rootonly.Open and records untrusted files.
func (p *Prober) open(file string) (*os.File, error) {
	f, err := rootonly.Open(p.root, file)
	if e := (*rootonly.FileError)(nil); errors.As(err, &e) {
		p.mu.Lock()
		defer p.mu.Unlock()
		u := finding.Untrusted{File: e.File, Path: e.Because, Reason: e.Reason, Shared: e.Shared}
		if !slices.Contains(p.untrusted, u) && len(p.untrusted) < maxFiles {
			p.untrusted = append(p.untrusted, u)
		}
	}

	return f, err
}

// kernel returns the trimmed content of a file in procfs or sysfs, "" if it is not readable.
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
