package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"cri-dockerd/internal/model"
)

// TestHasValue compares the contents of files as the kernel prints them with values as written.
func TestHasValue(t *testing.T) {
	page := uint64(os.Getpagesize())
	for _, c := range []struct {
		key            model.UnifiedKey
		content, value string
		want           bool
	}{
		{"memory.high", "max\n", "max", true},
		{"memory.high", "max\n", "1000", false},
		{"memory.high", fmt.Sprintln(2 * page), fmt.Sprint(2*page + 7), true},
		{"memory.high", fmt.Sprintln(2 * page), fmt.Sprint(3 * page), false},
		{"memory.max", "max\n", "9223372036854775807", true},
		{"memory.oom.group", "1\n", "1", true},
		{"memory.oom.group", "0\n", "1", false},
		{"pids.max", "1001\n", "1001\n", true},
		{"io.weight", "default 50\n8:0 10\n", "50", true},
		{"io.weight", "default 50\n8:0 10\n", "default 50\n8:0 10", true},
		{"io.weight", "default 50\n", "default 50\n8:0 10", false},
		{"cpu.weight", "50\n", "100", false},
		{"cpu.max", "max 100000\n", "20000 100000", false},
	} {
		t.Run(fmt.Sprintf("%s %q %q", c.key, c.content, c.value), func(t *testing.T) {
			if got := hasValue(c.key, c.content, c.value); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// TestLostUnified expects files with other values, but neither missing files nor files without a
// value to read.
func TestLostUnified(t *testing.T) {
	k, g := v2(t)
	if err := os.Mkdir(filepath.Join(k.Cgroup, "pods/c0ffee/memory.reclaim"), 0o755); err != nil { // cannot be read
		t.Fatal(err)
	}

	got := g.LostUnified(map[model.UnifiedKey]string{
		"memory.high":     "4096",
		"io.weight":       "100",
		"hugetlb.1GB.max": "0",
		"memory.reclaim":  "1G",
		"no.such":         "1",
	})
	if want := []model.UnifiedKey{"hugetlb.1GB.max", "memory.high"}; !slices.Equal(got, want) {
		t.Errorf("lost: %v, want %v", got, want)
	}
}

func TestScope(t *testing.T) {
	for _, c := range []struct {
		path string
		v2   bool
		want string
	}{
		{"/kubepods.slice/docker-c0ffee.scope", true, "docker-c0ffee.scope"},
		{"/kubepods.slice/docker-c0ffee.scope", false, ""},
		{"/kubepods/c0ffee", true, ""},
	} {
		t.Run(fmt.Sprint(c.path, c.v2), func(t *testing.T) {
			g := &Group{path: c.path, v2: c.v2}
			if got := g.Scope(); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
