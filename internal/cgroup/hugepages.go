package cgroup

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// HugePages is what a group uses of one size. Pointers are nil where this kernel does not tell.
type HugePages struct {
	Size      string  // as the files of the groups have it: "2MB", "1GB"
	Usage     uint64  // bytes
	MaxUsage  *uint64 // bytes: the most that it has been
	LimitHits *uint64
}

// PageSizes are the sizes of huge pages of which this machine has any (/sys/kernel/mm/hugepages), or may have when they are asked for.
func (k Kernel) PageSizes() []string {
	entries, _ := os.ReadDir(k.Pages) // not there: no huge pages
	var out []string
	for _, e := range entries {
		kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(e.Name(), "hugepages-"), "kB"), 10, 64)
		if err != nil {
			continue
		}
		for _, file := range []string{"nr_hugepages", "nr_overcommit_hugepages"} {
			if n := fromFile(filepath.Join(k.Pages, e.Name(), file)); n != nil && *n > 0 {
				out = append(out, pageSize(kib))
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

// HugePages reads what the group uses of pages of these sizes; those that this machine does not account for are left out.
func (g *Group) HugePages(sizes []string) []HugePages {
	var out []HugePages
	for _, size := range sizes {
		prefix, current := filepath.Join(g.dir(hugetlb), "hugetlb."+size), ".usage_in_bytes"
		if g.V2() {
			prefix, current = filepath.Join(g.dir(unified), "hugetlb."+size), ".current"
		}
		usage := fromFile(prefix + current)
		if usage == nil {
			continue
		}
		h := HugePages{Size: size, Usage: *usage, MaxUsage: fromFile(prefix + ".max_usage_in_bytes"), LimitHits: fromFile(prefix + ".failcnt")}
		if b, err := os.ReadFile(prefix + ".events"); err == nil {
			if n, err := parse(trim([]byte(strings.TrimPrefix(string(b), "max ")))); err == nil {
				h.LimitHits = &n
			}
		}
		out = append(out, h)
	}
	return out
}

// fromFile is the only number of a file that is seldom read, nil if there is none.
func fromFile(name string) *uint64 {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil
	}
	n, err := parse(trim(b))
	if err != nil {
		return nil
	}
	return &n
}
