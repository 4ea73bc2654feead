package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

const id = "c0ffee"

// fixture creates kernel files in a temporary directory.
func fixture(t testing.TB, files map[string]string) Kernel {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	return Kernel{
		Proc:   filepath.Join(dir, "proc"),
		Cgroup: filepath.Join(dir, "cgroup"),
		Pages:  filepath.Join(dir, "pages"),
	}
}

func v1(t *testing.T) (Kernel, *Group) {
	t.Helper()
	k := fixture(t, map[string]string{
		"proc/7/cgroup": "12:hugetlb:/pods/c0ffee\n4:memory:/pods/c0ffee\n" +
			"2:cpu,cpuacct:/pods/c0ffee\n1:name=systemd:/pods/c0ffee\n0::/pods/c0ffee\n",
		"proc/7/oom_score_adj":                                  "100\n",
		"proc/8/oom_score_adj":                                  "100\n",
		"proc/8/cgroup":                                         "4:memory:/pods/c0ffee/own\n",
		"proc/10/cgroup":                                        "4:memory:/pods/another\n", // reused PID
		"proc/10/oom_score_adj":                                 "100\n",
		"cgroup/memory/pods/c0ffee/cgroup.procs":                "7\n",
		"cgroup/memory/pods/c0ffee/own/cgroup.procs":            "8\n9\n10\n", // 9 has just ended
		"cgroup/hugetlb/pods/c0ffee/hugetlb.2MB.limit_in_bytes": "9223372036854771712\n",
	})

	g, err := k.FindGroup(7, id)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(g.Close)

	return k, g
}

func v2(t *testing.T) (Kernel, *Group) {
	t.Helper()
	k := fixture(t, map[string]string{
		"proc/7/cgroup":                      "0::/pods/c0ffee\n",
		"proc/7/oom_score_adj":               "0\n",
		"cgroup/pods/c0ffee/cgroup.procs":    "7\n",
		"cgroup/pods/c0ffee/memory.high":     "max\n",
		"cgroup/pods/c0ffee/io.weight":       "default 100\n",
		"cgroup/pods/c0ffee/hugetlb.1GB.max": "max\n",
	})

	g, err := k.FindGroup(7, id)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(g.Close)

	return k, g
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func process(k Kernel, pid int, file string) string {
	return filepath.Join(k.Proc, strconv.Itoa(pid), file)
}

func TestAnotherProcessIsNotTheContainer(t *testing.T) {
	k, _ := v1(t)
	for pid, container := range map[int]string{7: "beef", 10: id, 99: id, 0: ""} {
		t.Run(fmt.Sprint(pid, container), func(t *testing.T) {
			if _, err := k.FindGroup(pid, container); !errdefs.IsNotFound(err) {
				t.Errorf("process %d as container %q: error %v, want NotFound", pid, container, err)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	if _, g := v1(t); g.V2() {
		t.Error("V2() = true on a hybrid machine")
	}
	if _, g := v2(t); !g.V2() {
		t.Error("V2() = false for a group of cgroup v2")
	}
}

func TestSetOOMScoreAdjOfAllProcesses(t *testing.T) {
	k, g := v1(t)
	if err := g.SetOOMScoreAdj(-5); err != nil {
		t.Fatal(err)
	}

	for _, pid := range []int{7, 8} {
		if got := read(t, process(k, pid, "oom_score_adj")); got != "-5" {
			t.Errorf("process %d has %q", pid, got)
		}
	}

	if got, err := g.OOMScoreAdj(); got != -5 || err != nil {
		t.Errorf("read back: %d, %v", got, err)
	}

	if _, err := os.Stat(process(k, 9, "oom_score_adj")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a file was created for an ended process")
	}

	if got := read(t, process(k, 10, "oom_score_adj")); got != "100\n" {
		t.Errorf("a process of another container has %q", got)
	}
}

func TestHugepages(t *testing.T) {
	for name, c := range map[string]struct {
		create func(*testing.T) (Kernel, *Group)
		size   model.PageSize
	}{"v1": {v1, "2MB"}, "v2": {v2, "1GB"}} {
		t.Run(name, func(t *testing.T) {
			_, g := c.create(t)
			if err := g.SetHugepages(map[model.PageSize]uint64{c.size: 4096, "64KB": 0}); err != nil {
				t.Fatal(err)
			}

			if got := g.Hugepages([]model.PageSize{c.size, "64KB"}); !maps.Equal(got,
				map[model.PageSize]uint64{c.size: 4096}) {
				t.Errorf("read back: %v", got)
			}

			if err := g.SetHugepages(map[model.PageSize]uint64{"16GB": 1}); !errdefs.IsFailedPrecondition(err) ||
				!strings.Contains(err.Error(), "16GB") {
				t.Errorf("limit of an unsupported size: error %v, want FailedPrecondition with the size", err)
			}
		})
	}
}

func TestUnified(t *testing.T) {
	k, g := v2(t)
	if err := g.SetUnified(map[model.UnifiedKey]string{
		"memory.high": "1000",
		"io.weight":   "default 50\n8:0 10",
	}); err != nil {
		t.Fatal(err)
	}

	if got := read(t, filepath.Join(k.Cgroup, "pods/c0ffee/memory.high")); !strings.HasPrefix(got, "1000") {
		t.Errorf("memory.high: %q", got)
	}

	if got := g.Unified([]model.UnifiedKey{"io.weight", "no.such"}); len(got) != 1 ||
		!strings.HasPrefix(got["io.weight"], "8:0 10") {
		t.Errorf("read back: %v", got) // the kernel reads line by line, a plain file keeps the last line
	}

	if err := g.SetUnified(map[model.UnifiedKey]string{"no.such": "1"}); !errdefs.IsInvalidArgument(err) ||
		!errors.Is(err, os.ErrNotExist) {
		t.Errorf("write of an unknown file: error %v, want InvalidArgument and ErrNotExist", err)
	}

	if _, err := os.Stat(filepath.Join(k.Cgroup, "pods/c0ffee/no.such")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("an unknown file was created")
	}

	_, old := v1(t)
	if err := old.SetUnified(map[model.UnifiedKey]string{"memory.high": "1"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("SetUnified on cgroup v1: error %v, want FailedPrecondition", err)
	}
}

// TestRead reads entire files of any length.
func TestRead(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	for _, n := range []int{0, 1, 1023, 1024, atEnd - 1, atEnd, atEnd + 1, 4096, 100_000} {
		want := strings.Repeat("x", n)
		if err := os.WriteFile(file, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}

		for _, room := range []int{0, n, n + 1, n + atEnd} {
			if got, err := Read(file, make([]byte, 0, room)); err != nil || string(got) != want {
				t.Errorf("%d of %d bytes into %d: %v", len(got), n, room, err)
			}
		}
	}

	if got, err := Read("/proc/self/mounts", nil); err != nil || !strings.HasSuffix(string(got), "\n") {
		t.Errorf("mounts: %q, %v", got, err)
	}
}
