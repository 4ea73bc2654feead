package podnet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
)

// Prepare creates the directory of pins and lets its mounts propagate to containers. It also moves
// pins of earlier versions from the directory of records, without disturbing their pods.
func (p *Pins) Prepare() error {
	dir, err := openShared(p.dir)
	if err != nil {
		return fmt.Errorf("directory of network namespaces: %w", err)
	}

	dir.Close()
	errs := []error{shareMounts(p.dir)}
	for _, id := range p.List() {
		errs = append(errs, p.move(id))
	}

	return errors.Join(errs...)
}

// move moves a pin of an earlier version. The path known to its plugins becomes a link to the new
// place.
func (p *Pins) move(id model.ContainerID) error {
	if !isPinnedIn(p.records, string(id)) {
		return nil
	}

	old, err := openNetNS(filepath.Join(p.records, string(id)))
	if err != nil {
		return fmt.Errorf("move network namespace of sandbox %s: %w", id, err)
	}
	defer old.Close()

	if !isPinnedIn(p.dir, pinName(id)) { // already pinned if a crash interrupted an earlier move
		dir, err := openShared(p.dir)
		if err != nil {
			return fmt.Errorf("move network namespace of sandbox %s: %w", id, err)
		}
		defer dir.Close()

		if err := mountIn(dir, old, pinName(id)); err != nil {
			return err
		}
	}

	records, err := p.openRecords(true)
	if err != nil {
		return fmt.Errorf("move network namespace of sandbox %s: %w", id, err)
	}
	defer records.Close()

	if err := unmountAll(records, string(id)); err != nil {
		return err
	}

	return p.record(id) // replaces the former mount point
}

// shareMounts lets mounts below a directory propagate to other mount namespaces, as under systemd.
// If no mount above is shared, the directory becomes a shared mount of its own, as in ip-netns(8).
func shareMounts(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fmt.Errorf("directory of network namespaces: %w", err)
	}

	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(real))
	if err != nil {
		return fmt.Errorf("directory of network namespaces: %w", err)
	}

	var within *mountinfo.Info
	for _, m := range mounts { // the last of the longest paths lies on top
		if within == nil || len(m.Mountpoint) >= len(within.Mountpoint) {
			within = m
		}
	}

	if within != nil && strings.Contains(within.Optional, "shared:") {
		return nil
	}

	if within == nil || within.Mountpoint != real {
		if err := unix.Mount(real, real, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return os.NewSyscallError("mount "+real, err)
		}
	}

	if err := unix.Mount("", real, "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return os.NewSyscallError("share "+real, err)
	}

	return nil
}
