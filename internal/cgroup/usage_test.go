package cgroup

import (
	"errors"
	"io/fs"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func number64(n uint64) *uint64 { return &n }

// The memory.stat of a 6.18 kernel with cgroup v1, without lines that are not read.
const statV1 = `cache 9322496
rss 28004352
pgfault 14962
pgmajfault 11
inactive_file 8482816
hierarchical_memory_limit 67108864
hierarchical_memsw_limit 9223372036854771712
total_cache 9322496
total_rss 28004352
total_swap 4096
total_pgfault 14963
total_pgmajfault 12
total_inactive_file 8482816
`

// The files of a 6.1 kernel with cgroup v2.
var filesV2 = map[string]string{
	"cpu.stat":            "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\nnr_periods 0\nnr_throttled 0\nthrottled_usec 0\n",
	"memory.current":      "37777408\n",
	"memory.max":          "67108864\n",
	"memory.stat":         "anon 28004352\nfile 9322496\nkernel 450560\ninactive_anon 27996160\nactive_anon 4096\ninactive_file 8482816\nactive_file 839680\npgfault 14963\npgmajfault 12\n",
	"memory.swap.current": "4096\n",
	"memory.swap.max":     "max\n",
	"cpu.pressure":        "some avg10=1.50 avg60=0.25 avg300=0.05 total=1234567\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
	"memory.pressure":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=4\n",
	"cgroup.procs":        "7\n8\n",
}

func TestUsageV1(t *testing.T) {
	k := fixture(t, map[string]string{
		"proc/7/cgroup": "5:pids:/pods/c0ffee\n4:memory:/pods/c0ffee\n2:cpu,cpuacct:/pods/c0ffee\n0::/\n",
		"cgroup/memory/pods/c0ffee/memory.usage_in_bytes": "37777408\n", "cgroup/memory/pods/c0ffee/memory.stat": statV1,
		"cgroup/memory/pods/c0ffee/cgroup.procs": "7\n", "cgroup/memory/pods/c0ffee/inner/cgroup.procs": "8\n9\n", "cgroup/cpuacct/pods/c0ffee/cpuacct.usage": "1500000000\n",
		"cgroup/memory/pods/memory.usage_in_bytes": "40000000\n", "cgroup/memory/pods/memory.stat": "total_rss 1\nhierarchical_memory_limit 9223372036854771712\ntotal_inactive_file 50000000\n",
		"cgroup/cpuacct/pods/cpuacct.usage": "2000000000\n", "cgroup/memory/pods/cgroup.procs": "",
	})
	g, err := k.Of(7, id)
	if err != nil {
		t.Fatal(err)
	}
	got, err := g.Usage()
	if err != nil {
		t.Fatal(err)
	}
	want := Usage{
		CPU:    1500000000,
		Memory: Memory{Usage: 37777408, WorkingSet: 37777408 - 8482816, RSS: 28004352, Limit: number64(67108864), Faults: 14963, MajorFaults: 12},
		Swap:   &Swap{Usage: 4096}, Processes: 3,
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Usage{}, "At")); diff != "" {
		t.Error(diff)
	}
	if d := time.Since(got.At); d < 0 || d > time.Minute {
		t.Errorf("read %v ago", d)
	}
	pod, err := g.Parent().Usage()
	if err != nil || g.Parent().Name() != "pods" {
		t.Fatalf("%s: %v", g.Parent().Name(), err)
	}
	if pod.CPU != 2000000000 || pod.Memory.WorkingSet != 0 || pod.Memory.Limit != nil || pod.Swap != nil || pod.Processes != 3 {
		t.Errorf("the pod: %+v", pod)
	}
}

func TestUsageV2(t *testing.T) {
	files := map[string]string{"proc/7/cgroup": "0::/pods/c0ffee\n"}
	for name, content := range filesV2 {
		files["cgroup/pods/c0ffee/"+name] = content
	}
	k := fixture(t, files)
	g, err := k.Of(7, id)
	if err != nil {
		t.Fatal(err)
	}
	got, err := g.Usage()
	if err != nil {
		t.Fatal(err)
	}
	want := Usage{
		CPU:    1500000000,
		Memory: Memory{Usage: 37777408, WorkingSet: 37777408 - 8482816, RSS: 28004352, Limit: number64(67108864), Faults: 14963, MajorFaults: 12},
		Swap:   &Swap{Usage: 4096}, Processes: 2,
		CPUPressure:    &Pressure{Some: Stall{Avg10: 1.5, Avg60: .25, Avg300: .05, Total: 1234567 * time.Microsecond}},
		MemoryPressure: &Pressure{Some: Stall{Total: 5 * time.Microsecond}, Full: Stall{Total: 4 * time.Microsecond}},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Usage{}, "At")); diff != "" {
		t.Error(diff)
	}
	if _, err := g.Parent().Usage(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a group without figures: %v", err)
	}
	if name := g.Name(); name != id {
		t.Errorf("name %s", name)
	}
}
