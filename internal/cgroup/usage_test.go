package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"

	"cri-dockerd/internal/model"
)

// kernel creates the files of testdata/<name>.txtar and finds the group of its container.
func kernel(t testing.TB, name string) (Kernel, *Group) {
	t.Helper()
	a, err := txtar.ParseFile("testdata/" + name + ".txtar")
	if err != nil {
		t.Fatal(err)
	}

	files := map[string]string{}
	for _, f := range a.Files {
		files[f.Name] = string(f.Data)
	}

	k := fixture(t, files)
	g, err := k.FindGroup(7, id)
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(g.Close)

	return k, g
}

func details(t *testing.T, g *Group) Details {
	t.Helper()
	d, err := g.Details()
	if err != nil {
		t.Fatal(err)
	}

	if old := time.Since(d.At); old < 0 || old > time.Minute {
		t.Errorf("read %v ago", old)
	}

	u, err := g.Usage()
	if err != nil {
		t.Fatal(err)
	}

	want := d.Usage
	if g.hybrid {
		want.CPUPressure, want.MemoryPressure, want.IOPressure = nil, nil, nil
	}
	if diff := cmp.Diff(want, u, cmpopts.IgnoreFields(Usage{}, "At")); diff != "" {
		t.Errorf("the details and the usage differ: %s", diff)
	}

	return d
}

func compare(t *testing.T, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Usage{}, "At")); diff != "" {
		t.Error(diff)
	}
}

// memoryOfAll is the memory usage in both v1.txtar and v2.txtar.
var memoryOfAll = Memory{
	Usage:        37777408,
	WorkingSet:   37777408 - 8482816,
	RSS:          28004352,
	Cache:        9322496,
	MappedFile:   6291456,
	ActiveFile:   839680,
	InactiveFile: 8482816,
	Limit:        ptr(67108864),
	Faults:       14963,
	MajorFaults:  12,
}

func TestV1(t *testing.T) {
	k, g := kernel(t, "v1")
	want := Details{
		Usage:          Usage{CPU: 1500000000, Memory: memoryOfAll, Swap: &Swap{Usage: 4096}},
		User:           1000000000,
		System:         500000000,
		Throttling:     &Throttling{},
		KernelMemory:   ptr(450560),
		MaxUsage:       ptr(40000000),
		LimitHits:      ptr(9),
		HighHits:       ptr(0),
		OOMKills:       ptr(1),
		OwnFaults:      14962,
		OwnMajorFaults: 11,
		Threads:        ptr(3),
		Devices:        []Device{{Major: 8, ReadBytes: 90430464, WriteBytes: 299008000, Reads: 8950, Writes: 1252}},
	}

	compare(t, want, details(t, g))
	compare(t, []HugePages{{
		Size:      "1GB",
		Usage:     1 << 30,
		MaxUsage:  ptr(2 << 30),
		LimitHits: ptr(4),
	}}, g.HugePages(k.PageSizes()))

	if pids, err := g.PIDs(); !slices.Equal(pids, []int{7, 8, 9}) || err != nil {
		t.Errorf("processes %v, %v", pids, err)
	}

	p := g.Parent()
	defer p.Close()

	pod := details(t, p)
	compare(t, Details{Usage: Usage{CPU: 2000000000, Memory: Memory{
		Usage:        40000000,
		RSS:          1,
		InactiveFile: 50000000,
	}}, HighHits: ptr(0)}, pod)

	if p.Path() != "/pods" {
		t.Errorf("the pod is at %s", p.Path())
	}
}

func TestHybrid(t *testing.T) {
	k, g := kernel(t, "hybrid")
	want := Details{
		Usage: Usage{
			CPU: 61011513,
			Memory: Memory{
				Usage:        21770240,
				WorkingSet:   21770240 - 20971520,
				RSS:          53248,
				Cache:        20971520,
				InactiveFile: 20971520,
				Limit:        ptr(64 << 20),
				Faults:       1504,
			},
			Swap: &Swap{Limit: ptr(0)},
			CPUPressure: &Pressure{
				Some: Stall{Avg10: 2.07, Avg60: .44, Avg300: .09, Total: 297346 * time.Microsecond},
				Full: Stall{Avg10: 2.07, Avg60: .44, Avg300: .09, Total: 290392 * time.Microsecond},
			},
			MemoryPressure: &Pressure{},
			IOPressure: &Pressure{
				Some: Stall{Total: 17923 * time.Microsecond},
				Full: Stall{Total: 17923 * time.Microsecond},
			},
		},
		System:       50000000,
		Throttling:   &Throttling{Periods: 6, Throttled: 1, Time: 18126872},
		KernelMemory: ptr(745472),
		MaxUsage:     ptr(23060480),
		LimitHits:    ptr(0),
		HighHits:     ptr(0),
		OOMKills:     ptr(0),
		OwnFaults:    1504,
		Threads:      ptr(1),
	}

	compare(t, want, details(t, g))
	if g.V2() || g.Path() != "/kubepods/burstable/pod1/c0ffee" {
		t.Errorf("v2: %v, path %s", g.V2(), g.Path())
	}
	if h := g.HugePages(k.PageSizes()); h != nil {
		t.Errorf("huge pages on a machine without any: %v", h)
	}

	compare(t, []HugePages{{
		Size:      "2MB",
		MaxUsage:  ptr(0),
		LimitHits: ptr(0),
	}}, g.HugePages([]model.PageSize{"2MB", "64KB"}))

	if err := os.Remove(filepath.Join(k.Cgroup, "memory/kubepods/burstable/pod1/c0ffee/cgroup.procs")); err != nil {
		t.Fatal(err)
	}

	if n, err := g.Processes(); n != 1 || err != nil { // the only task is the main process
		t.Errorf("%d processes, %v", n, err)
	}
}

func TestV2(t *testing.T) {
	k, g := kernel(t, "v2")
	want := Details{
		Usage: Usage{
			CPU:    1500000000,
			Memory: memoryOfAll,
			Swap:   &Swap{Usage: 4096},
			CPUPressure: &Pressure{Some: Stall{
				Avg10:  1.5,
				Avg60:  .25,
				Avg300: .05,
				Total:  1234567 * time.Microsecond,
			}},
			MemoryPressure: &Pressure{
				Some: Stall{Total: 5 * time.Microsecond},
				Full: Stall{Total: 4 * time.Microsecond},
			},
		},
		User:           1000000000,
		System:         500000000,
		Throttling:     &Throttling{Periods: 20, Throttled: 5, Time: 250000000},
		KernelMemory:   ptr(450560),
		MaxUsage:       ptr(40000000),
		LimitHits:      ptr(3),
		HighHits:       ptr(6),
		OOMKills:       ptr(1),
		OwnFaults:      14963,
		OwnMajorFaults: 12,
		Threads:        ptr(5),
		MaxThreads:     ptr(1024),
		Devices: []Device{
			{Major: 8, Minor: 16, ReadBytes: 1459200, WriteBytes: 314773504, Reads: 192, Writes: 353},
			{Major: 8, ReadBytes: 90430464, WriteBytes: 299008000, Reads: 8950, Writes: 1252},
		},
	}

	compare(t, want, details(t, g))
	compare(t, []HugePages{{Size: "2MB", Usage: 4194304, LimitHits: ptr(7)}}, g.HugePages(k.PageSizes()))
	if pids, err := g.PIDs(); !slices.Equal(pids, []int{7, 8}) || err != nil {
		t.Errorf("processes %v, %v", pids, err)
	}

	if _, err := g.Parent().Usage(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("usage of a group without stats: error %v, want ErrNotExist", err)
	}
}

// TestFilesStayOpen expects reads through open files to return current values, and Close to release
// the files.
func TestFilesStayOpen(t *testing.T) {
	k, g := kernel(t, "v1")
	before := descriptors(t) - 1 // without the process's directory
	if _, err := g.Details(); err != nil {
		t.Fatal(err)
	}

	usage := filepath.Join(k.Cgroup, "cpuacct/pods/c0ffee/cpuacct.usage")
	if err := os.WriteFile(usage, []byte("1600000000\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	d, err := g.Details()
	if err != nil || d.CPU != 1600000000 {
		t.Errorf("read again: %d, %v", d.CPU, err)
	}

	if n := descriptors(t); n <= before {
		t.Errorf("%d descriptors before, %d while open", before, n)
	}

	g.Close()
	g.Close()
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors before, %d afterwards", before, n)
	}
	if _, err := g.Usage(); !errdefs.IsNotFound(err) {
		t.Errorf("read after Close: %v", err)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestRemovedGroup uses a real group, because no plain file behaves like the kernel's after the
// removal of its group.
func TestRemovedGroup(t *testing.T) {
	k := Host()
	var st unix.Statfs_t
	if err := unix.Statfs(k.Cgroup, &st); err != nil {
		t.Fatal(err)
	}

	g, f := &Group{kernel: k, path: fmt.Sprintf("/cri-dockerd-test-%d", os.Getpid())}, cpuacctUsage
	dir := filepath.Join(k.Cgroup, "cpuacct", g.path)
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		dir = filepath.Join(k.Cgroup, g.path)
		g.v2, f = true, cpuStat
	} else { // processes are first searched in the memory hierarchy
		g.paths[cpuacct], g.paths[memory] = g.path, g.path
	}

	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer g.Close()

	read := func() error {
		defer g.beginRead()()
		_, err := g.readContent(f)
		return err
	}

	first := read()
	if err := os.Remove(dir); err != nil || first != nil {
		t.Fatalf("first read: %v, removal: %v", first, err)
	}

	again := read()
	_, err := g.Processes()
	if !errdefs.IsNotFound(again) || !errdefs.IsNotFound(err) {
		t.Errorf("read of a removed group: errors %v, %v, want NotFound", again, err)
	}
}

func BenchmarkUsage(b *testing.B) {
	for _, name := range []string{"v1", "hybrid", "v2"} {
		b.Run(name, func(b *testing.B) {
			_, g := kernel(b, name)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := g.Usage(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
