package model

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const digest = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestParse(t *testing.T) {
	parsers := map[string]func(string) error{
		"container": func(s string) error { _, err := ParseContainerID(s); return err },
		"image":     func(s string) error { _, err := ParseImageID(s); return err },
		"page":      func(s string) error { _, err := ParsePageSize(s); return err },
		"unified":   func(s string) error { _, err := ParseUnifiedKey(s); return err },
	}

	cases := map[string]struct{ good, bad []string }{
		"container": {
			good: []string{digest},
			bad: []string{"", "a", digest[:63], digest + "0", strings.ToUpper(digest), "../" + digest[3:],
				digest[:63] + "/"},
		},
		"image": {
			good: []string{"sha256:" + digest},
			bad:  []string{"", digest, "sha512:" + digest, "sha256:../../" + digest[6:], "sha256:" + digest + "\n"},
		},
		"page": {
			good: []string{"2MB", "1GB", "64KB", "16GB"},
			bad:  []string{"", "MB", "2", "02MB", "2MBMB", "2TB", "../2MB", "2MB/", "2M", "2KMB", "123456789MB"},
		},
		"unified": {
			good: []string{"memory.high", "hugetlb.2MB.max", "cpu.weight.nice", "io.max", "hugetlb.1GB.rsvd.max"},
			bad: []string{
				"", "memory", "memory.", ".high", "memory.high/..", "../memory.high", "cgroup.procs", "cgroup.kill",
				"memory..high", "memory.hi gh", "memory.high\n", "memory.\x00", "Memory.high", "memory." +
					strings.Repeat("a", 64),
			},
		},
	}

	for kind, c := range cases {
		for _, s := range c.good {
			if err := parsers[kind](s); err != nil {
				t.Errorf("%s %q: %v", kind, s, err)
			}
		}

		for _, s := range c.bad {
			if err := parsers[kind](s); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s %q: error %v, want InvalidArgument", kind, s, err)
			}
		}
	}
}

// FuzzParse asserts that whatever a constructor accepts is one file name, below any directory.
func FuzzParse(f *testing.F) {
	for _, s := range []string{digest, "sha256:" + digest, "2MB", "memory.high", "../x", "a/b", ""} {
		f.Add(s)
	}

	f.Fuzz(func(t *testing.T, s string) {
		accepted := false
		if _, err := ParseContainerID(s); err == nil {
			accepted = true
		}

		if _, err := ParsePageSize(s); err == nil {
			accepted = true
		}

		if _, err := ParseUnifiedKey(s); err == nil {
			accepted = true
		}

		if i, err := ParseImageID(s); err == nil {
			accepted, s = true, i.Hex()
		}

		if accepted && (filepath.Base(s) != s || !filepath.IsLocal(s) || strings.ContainsAny(s, "/\x00\n")) {
			t.Errorf("%q is accepted and is no plain file name", s)
		}
	})
}
