package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// SetHugepages limits huge pages by their size, in bytes (hugetlb.<size>.limit_in_bytes, on v2
// hugetlb.<size>.max). If this machine cannot limit a size, a limit of 0 is ignored and any other
// is FailedPrecondition.
func (g *Group) SetHugepages(limits map[model.PageSize]uint64) error {
	for size, limit := range limits {
		c, name := g.hugepageFile(size)
		err := g.writeFile(c, name, strconv.FormatUint(limit, 10))
		switch {
		case errors.Is(err, fs.ErrNotExist) && limit == 0:
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("hugepage_limits[%s]: this machine does not limit pages of that size (no hugetlb "+
				"control group): %w", size, errdefs.ErrFailedPrecondition)
		case err != nil:
			return fmt.Errorf("hugepage_limits[%s]: %w: %w", size, err, errdefs.ErrInvalidArgument)
		}
	}

	return nil
}

// Hugepages reads the limits of these sizes, in bytes. It omits sizes without a limit.
func (g *Group) Hugepages(sizes []model.PageSize) map[model.PageSize]uint64 {
	out := map[model.PageSize]uint64{}
	for _, size := range sizes {
		c, name := g.hugepageFile(size)
		if n := g.readNumber(c, name); n != nil { // "max" means no limit
			out[size] = *n
		}
	}

	return out
}

// hugepageFile returns the file with the limit of a size.
func (g *Group) hugepageFile(size model.PageSize) (controller, string) {
	if g.V2() {
		return unified, "hugetlb." + string(size) + ".max"
	}
	return hugetlb, "hugetlb." + string(size) + ".limit_in_bytes"
}

// SetUnified writes files of cgroup v2 by name. It writes a value of several lines line by line, as
// required by the kernel. It returns FailedPrecondition on a v1 machine, and InvalidArgument if the
// kernel rejects a value.
func (g *Group) SetUnified(values map[model.UnifiedKey]string) error {
	if len(values) == 0 {
		return nil
	}
	if !g.V2() {
		return fmt.Errorf("unified: this machine has cgroup v1: %w", errdefs.ErrFailedPrecondition)
	}

	for _, key := range slices.Sorted(maps.Keys(values)) {
		for line := range strings.SplitSeq(values[key], "\n") {
			if line == "" {
				continue
			}
			if err := g.writeFile(unified, string(key), line); err != nil {
				return fmt.Errorf("unified[%s]: %q: %w: %w", key, line, err, errdefs.ErrInvalidArgument)
			}
		}
	}

	return nil
}

// Unified reads files of cgroup v2 by name. It omits missing files.
func (g *Group) Unified(keys []model.UnifiedKey) map[model.UnifiedKey]string {
	out := map[model.UnifiedKey]string{}
	for _, key := range keys {
		if b, err := g.readFile(unified, string(key)); err == nil {
			out[key] = strings.TrimSpace(string(b))
		}
	}
	return out
}
