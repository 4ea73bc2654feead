package cgroup

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"cri-dockerd/internal/model"
)

// HugePages is what a group uses of one size. Pointers are nil where this kernel does not tell.
type HugePages struct {
	Size      model.PageSize
	Usage     uint64  // bytes
	MaxUsage  *uint64 // bytes: the most that it has been
	LimitHits *uint64
}

// PageSizes are the sizes of huge pages of which this machine has any (/sys/kernel/mm/hugepages),
// or may have when they are asked for.
func (k Kernel) PageSizes() []model.PageSize {
	entries, _ := os.ReadDir(k.Pages) // not there: no huge pages
	var out []model.PageSize
	for _, e := range entries {
		kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(e.Name(), "hugepages-"), "kB"), 10, 64)
		if err != nil {
			continue
		}

		size, err := model.ParsePageSize(pageSize(kib))
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

// pageSize is how the kernel names a size in the files of control groups.
func pageSize(kib uint64) string {
	switch {
	case kib >= 1<<20:
		return strconv.FormatUint(kib>>20, 10) + "GB"
	case kib >= 1<<10:
		return strconv.FormatUint(kib>>10, 10) + "MB"
	}
	return strconv.FormatUint(kib, 10) + "KB"
}

// HugePages reads what the group uses of pages of these sizes; those that this machine does not
// account for are left out.
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
