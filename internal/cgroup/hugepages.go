package cgroup

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"cri-dockerd/internal/model"
)

// HugePages is a group's usage of one page size. Pointers are nil if this kernel does not report
// the value.
type HugePages struct {
	Size      model.PageSize
	Usage     uint64  // bytes
	MaxUsage  *uint64 // bytes, peak of Usage
	LimitHits *uint64
}

// PageSizes returns the sizes of huge pages available on this machine, reserved or on demand
// (/sys/kernel/mm/hugepages).
func (k Kernel) PageSizes() []model.PageSize {
	entries, _ := os.ReadDir(k.Pages) // the directory is missing without huge pages
	var out []model.PageSize
	for _, e := range entries {
		kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(e.Name(), "hugepages-"), "kB"), 10, 64)
		if err != nil {
			continue
		}

		size, err := model.ParsePageSize(formatPageSize(kib))
		if err != nil {
			continue
		}

		for _, file := range []string{"nr_hugepages", "nr_overcommit_hugepages"} {
			b, err := Read(filepath.Join(k.Pages, e.Name(), file), nil)
			if err != nil {
				continue
			}

			if n, err := parse(trim(b)); err == nil && n > 0 {
				out = append(out, size)
				break
			}
		}
	}

	return out
}

// formatPageSize returns the kernel's name of a size in the files of control groups.
func formatPageSize(kib uint64) string {
	switch {
	case kib >= 1<<20:
		return strconv.FormatUint(kib>>20, 10) + "GB"
	case kib >= 1<<10:
		return strconv.FormatUint(kib>>10, 10) + "MB"
	}
	return strconv.FormatUint(kib, 10) + "KB"
}

// HugePages reads the group's usage of pages of these sizes. It omits sizes without accounting on
// this machine.
func (g *Group) HugePages(sizes []model.PageSize) []HugePages {
	var out []HugePages
	for _, size := range sizes {
		c, prefix, current := hugetlb, "hugetlb."+string(size), ".usage_in_bytes"
		if g.V2() {
			c, current = unified, ".current"
		}

		usage := g.readNumber(c, prefix+current)
		if usage == nil {
			continue
		}

		h := HugePages{
			Size:      size,
			Usage:     *usage,
			MaxUsage:  g.readNumber(c, prefix+".max_usage_in_bytes"),
			LimitHits: g.readNumber(c, prefix+".failcnt"),
		}
		if b, err := g.readFile(c, prefix+".events"); err == nil {
			if n, err := parse(trim(bytes.TrimPrefix(b, []byte("max ")))); err == nil {
				h.LimitHits = &n
			}
		}

		out = append(out, h)
	}

	return out
}
