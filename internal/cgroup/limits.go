package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// SetHugepages limits huge pages by their size ("2MB", "1GB") in bytes (hugetlb.<size>.limit_in_bytes, on v2 hugetlb.<size>.max). On a
// machine that cannot limit a size, a limit of 0 is passed over and any other is FailedPrecondition.
func (g *Group) SetHugepages(limits map[string]uint64) error {
	for size, limit := range limits {
		file := g.hugepageFile(size)
		err := error(fs.ErrNotExist)
		if file != "" {
			err = write(file, strconv.FormatUint(limit, 10))
		}
		switch {
		case errors.Is(err, fs.ErrNotExist) && limit == 0:
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("hugepage_limits[%s]: this machine does not limit pages of that size (no hugetlb control group): %w", size, errdefs.ErrFailedPrecondition)
		case err != nil:
			return fmt.Errorf("hugepage_limits[%s]: %w: %w", size, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Hugepages reads the limits of the sizes that this machine limits, in bytes; those without a limit are left out.
func (g *Group) Hugepages(sizes []string) map[string]uint64 {
	out := map[string]uint64{}
	for _, size := range sizes {
		file := g.hugepageFile(size)
		if file == "" {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if v, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil { // "max" is none
			out[size] = v
		}
	}
	return out
}

// hugepageFile is where a size is limited, "" on a machine without the controller.
func (g *Group) hugepageFile(size string) string {
	if g.V2() {
		return filepath.Join(g.dir(unified), "hugetlb."+size+".max")
	}
	if dir := g.dir(hugetlb); dir != "" {
		return filepath.Join(dir, "hugetlb."+size+".limit_in_bytes")
	}
	return ""
}

// SetUnified writes files of cgroup v2 by name; a value of several lines is written line by line, as the kernel takes it. On a v1 machine
// it is FailedPrecondition; what the kernel refuses is InvalidArgument.
func (g *Group) SetUnified(values map[string]string) error {
	if len(values) == 0 {
		return nil
	}
	if !g.V2() {
		return fmt.Errorf("unified: this machine has cgroup v1: %w", errdefs.ErrFailedPrecondition)
	}
	names := make([]string, 0, len(values))
	for name := range values {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for line := range strings.SplitSeq(values[name], "\n") {
			if line == "" {
				continue
			}
			if err := write(filepath.Join(g.dir(unified), name), line); err != nil {
				return fmt.Errorf("unified[%s]: %q: %w: %w", name, line, err, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

// Unified reads files of cgroup v2 by name; those that are not there are left out.
func (g *Group) Unified(names []string) map[string]string {
	out := map[string]string{}
	for _, name := range names {
		if !g.V2() {
			continue
		}
		if b, err := os.ReadFile(filepath.Join(g.dir(unified), name)); err == nil {
			out[name] = strings.TrimSpace(string(b))
		}
	}
	return out
}

// write writes a kernel file, which must be there.
func write(file, value string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
