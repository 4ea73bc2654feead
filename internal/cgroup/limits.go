package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// pageSize is the kernel's unit of memory limits, in bytes.
var pageSize = os.Getpagesize()

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

// LostUnified returns the files of cgroup v2 with another value than the given one, sorted. It
// omits missing files, and those without a value to read: a write to them is an action, such as
// memory.reclaim.
func (g *Group) LostUnified(values map[model.UnifiedKey]string) []model.UnifiedKey {
	var out []model.UnifiedKey
	for _, key := range slices.Sorted(maps.Keys(values)) {
		b, err := g.readFile(unified, string(key))
		if err == nil && !hasValue(key, string(b), values[key]) {
			out = append(out, key)
		}
	}
	return out
}

// hasValue reports whether a file contains every line of a value. The kernel rounds bytes down to
// whole pages.
func hasValue(key model.UnifiedKey, content, value string) bool {
	lines := strings.Split(strings.TrimSpace(content), "\n")
	for line := range strings.SplitSeq(strings.TrimSpace(value), "\n") {
		line = strings.TrimSpace(line)
		if n, err := strconv.ParseUint(line, 10, 64); err == nil {
			if isBytes(key) {
				n -= n % uint64(pageSize)
			}
			line = strconv.FormatUint(n, 10)
			if n >= unlimited {
				line = "max"
			}
		}

		if !slices.Contains(lines, line) && !slices.Contains(lines, "default "+line) {
			return false
		}
	}

	return true
}

// isBytes reports whether a file holds a limit in bytes of the memory controller.
func isBytes(key model.UnifiedKey) bool {
	name := string(key)
	return strings.HasPrefix(name, "memory.") &&
		slices.Contains([]string{".min", ".low", ".high", ".max"}, filepath.Ext(name))
}
