package conformance

import (
	"fmt"
	"maps"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kernelLimits returns the kernel's limits of a container: shares, quota, memory, memory and swap,
// cpuset, and the OOM score of a child of its main process.
func (n *node) kernelLimits(t *testing.T, id string) string {
	t.Helper()
	score := strings.TrimSpace(n.exec(t, id, "sh", "-c", "cat /proc/$(cat /child)/oom_score_adj"))
	if !n.hasV2(t) {
		out := n.exec(t, id, "sh", "-c", "cd /sys/fs/cgroup && cat cpu/cpu.shares cpu/cpu.cfs_quota_us "+
			"memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes cpuset/cpuset.cpus")
		return strings.Join(append(strings.Fields(out), score), " ")
	}

	f := strings.Split(n.exec(t, id, "sh", "-c",
		"cd /sys/fs/cgroup && cat cpu.weight cpu.max memory.max memory.swap.max cpuset.cpus"), "\n")
	if len(f) < 5 {
		t.Fatalf("limits of the cgroup: %q", f)
	}

	quota, _, _ := strings.Cut(f[1], " ")
	if quota == "max" {
		quota = "-1"
	}

	memory, swap := atoi(t, f[2]), atoi(t, f[3])

	return fmt.Sprintf("%d %s %d %d %s %s", sharesOf(t, f[0]), quota, memory, memory+swap, f[4], score)
}

func atoi(t *testing.T, text string) int {
	t.Helper()
	i, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// sharesOf returns the CPU shares of this test for a weight of cgroup v2. runc maps 2 to 262144
// shares to weights linearly, and from 1.3.2 on along a curve with weight 100 for 1024 shares.
func sharesOf(t *testing.T, weight string) int {
	t.Helper()
	shares, ok := map[string]int{"20": 512, "59": 512, "10": 256, "35": 256}[weight]
	if !ok {
		t.Errorf("cpu.weight %s is that of neither 512 nor 256 shares", weight)
	}
	return shares
}

// hasV2 reports whether the node has only cgroup v2.
func (n *node) hasV2(t *testing.T) bool {
	t.Helper()
	return !strings.Contains(n.run(t, "cat", "/proc/self/cgroup"), ":memory:")
}

// hasHugepageLimits reports whether the node can limit huge pages.
func (n *node) hasHugepageLimits(t *testing.T) bool {
	t.Helper()
	const find = `cd /sys/fs/cgroup
		if [ -e cgroup.controllers ]; then grep -w hugetlb cgroup.controllers; else ls -d hugetlb; fi 2>/dev/null || true`
	return n.run(t, "sh", "-c", find) != ""
}

// hugepageLimit returns the kernel's limit of a container on huge pages of a size, such as 2MB, in
// bytes.
func (n *node) hugepageLimit(t *testing.T, id, size string) string {
	t.Helper()
	return strings.TrimSpace(n.exec(t, id, "sh", "-c", "cd /sys/fs/cgroup && "+
		"if [ -d hugetlb ]; then cat hugetlb/hugetlb."+size+".limit_in_bytes; else cat hugetlb."+size+".max; fi"))
}

// hasPages reports whether the processor has huge pages of this many KiB.
func (n *node) hasPages(t *testing.T, kib int) bool {
	t.Helper()
	return strings.Contains(n.run(t, "ls", "/sys/kernel/mm/hugepages"), fmt.Sprintf("hugepages-%dkB", kib))
}

// parent returns the configuration of a container with a child process. The PID of the child is in
// /child.
func (n *node) parent() *runtimeapi.ContainerConfig {
	return n.containerConfig(sh("sleep 1000 & echo $! > /child; wait"))
}

// update updates the resources of a container.
func (n *node) update(t *testing.T, id string, r *runtimeapi.LinuxContainerResources) {
	t.Helper()
	if _, err := n.Runtime.UpdateContainerResources(t.Context(),
		&runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: r}); err != nil {
		t.Errorf("UpdateContainerResources %v: %v", r, err)
	}
}

// resourceStep is an update of a container, and the limits after it.
type resourceStep struct {
	name string
	r    *runtimeapi.LinuxContainerResources
	want string
}

// resourceSteps returns updates in their order. The first step is the state after creation.
func resourceSteps(created *runtimeapi.LinuxContainerResources) []resourceStep {
	return []resourceStep{
		{
			name: "as created",
			r:    created,
			want: fmt.Sprint(512, 50000, 64*mib, 64*mib, " 0 ", 500),
		},
		{
			name: "CPU and memory",
			r: &runtimeapi.LinuxContainerResources{
				CpuShares:          256,
				CpuPeriod:          100000,
				CpuQuota:           20000,
				MemoryLimitInBytes: 128 * mib,
			},
			want: fmt.Sprint(256, 20000, 128*mib, 128*mib, " 0 ", 500),
		},
		{
			name: "less memory",
			r:    &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 96 * mib},
			want: fmt.Sprint(256, 20000, 96*mib, 96*mib, " 0 ", 500),
		},
		{
			name: "swap",
			r: &runtimeapi.LinuxContainerResources{
				MemoryLimitInBytes:     96 * mib,
				MemorySwapLimitInBytes: 160 * mib,
			},
			want: fmt.Sprint(256, 20000, 96*mib, 160*mib, " 0 ", 500),
		},
		{
			name: "cpuset",
			r:    &runtimeapi.LinuxContainerResources{CpusetCpus: "0-1"},
			want: fmt.Sprint(256, 20000, 96*mib, 160*mib, " 0-1 ", 500),
		},
		{
			name: "no quota",
			r:    &runtimeapi.LinuxContainerResources{CpuQuota: -1},
			want: fmt.Sprint(256, -1, 96*mib, 160*mib, " 0-1 ", 500),
		},
		{
			name: "OOM score",
			r:    &runtimeapi.LinuxContainerResources{OomScoreAdj: 321},
			want: fmt.Sprint(256, -1, 96*mib, 160*mib, " 0-1 ", 321),
		},
		{
			name: "empty resources",
			r:    &runtimeapi.LinuxContainerResources{},
			want: fmt.Sprint(256, -1, 96*mib, 160*mib, " 0-1 ", 321),
		},
		{
			name: "no resources",
			want: fmt.Sprint(256, -1, 96*mib, 160*mib, " 0-1 ", 321),
		},
	}
}

// TestResources updates the resources of a container and compares the kernel and ContainerStatus.
func TestResources(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cc := n.parent()
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{
			CpuShares:          512,
			CpuPeriod:          100000,
			CpuQuota:           50000,
			MemoryLimitInBytes: 64 << 20,
			CpusetCpus:         "0",
			OomScoreAdj:        500,
		}

		id := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
		eventually(t, "start of the child", func() bool {
			return n.exec(t, id, "sh", "-c", "cat /child 2>/dev/null || true") != ""
		})
		for _, step := range resourceSteps(cc.Linux.Resources) {
			t.Run(step.name, func(t *testing.T) {
				if step.name != "as created" {
					n.update(t, id, step.r)
				}
				if got := n.kernelLimits(t, id); got != step.want {
					t.Errorf("cgroup has %q, want %q", got, step.want)
				}

				r := n.containerStatus(t, id).GetResources().GetLinux()
				reported := fmt.Sprint(r.GetCpuShares(), r.GetCpuQuota(), r.GetMemoryLimitInBytes(),
					r.GetMemorySwapLimitInBytes(), " "+r.GetCpusetCpus()+" ", r.GetOomScoreAdj())
				if reported != step.want {
					t.Errorf("ContainerStatus has %q, want %q", reported, step.want)
				}
			})
		}
	})
}

// TestUnsupportedUpdates requests limits that this node lacks. The error names the field, and the
// container does not change.
func TestUnsupportedUpdates(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		file := "memory.high" // which cgroup v1 lacks
		if n.hasV2(t) {
			file = "../memory.high"
		}

		for field, r := range map[string]*runtimeapi.LinuxContainerResources{
			"linux.unified": {Unified: map[string]string{file: "1000"}},
			"linux.hugepage_limits[0].page_size": {
				HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2 megabytes"}},
			},
			"linux.oom_score_adj": {OomScoreAdj: -1001},
			"linux.cpu_period":    {CpuPeriod: -1},
		} {
			t.Run(field, func(t *testing.T) {
				_, err := n.Runtime.UpdateContainerResources(t.Context(),
					&runtimeapi.UpdateContainerResourcesRequest{ContainerId: c, Linux: r})
				assertInvalidArgument(t, err, field)
			})
		}

		_, err := n.Runtime.UpdateContainerResources(t.Context(),
			&runtimeapi.UpdateContainerResourcesRequest{
				ContainerId: strings.Repeat("0", 64),
				Linux:       &runtimeapi.LinuxContainerResources{CpuShares: 3},
			})
		if status.Code(err) != codes.NotFound {
			t.Errorf("update of an unknown container: %v, want NotFound", err)
		}

		cc := n.containerConfig(sh("true"))
		cc.Metadata.Name = "unified"
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{Unified: map[string]string{file: "1000"}}
		assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "config.linux.resources.unified")
	})
}

// TestHugepages limits huge pages like the kubelet: 0 for every page size of the node, more if a
// pod requests them.
func TestHugepages(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		limits := []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}
		want := map[string]uint64{"2MB": 8 << 20}
		if n.hasPages(t, 1<<20) {
			limits = append(limits, &runtimeapi.HugepageLimit{PageSize: "1GB"})
			want["1GB"] = 0
		}

		cfg := n.podConfig(t)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{HugepageLimits: limits}
		pod := n.runPod(t, cfg)
		if !n.hasHugepageLimits(t) {
			c := n.create(t, pod, cfg, cc)
			_, err := n.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c})
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "hugepage_limits[2MB]") {
				t.Errorf("limit without a hugetlb cgroup: %v, want FailedPrecondition", err)
			}
			return
		}

		c := n.startConfig(t, pod, cfg, cc)
		for _, l := range limits {
			if got := n.hugepageLimit(t, c, l.PageSize); got != fmt.Sprint(l.Limit) {
				t.Errorf("limit of %s pages: %q, want %d", l.PageSize, got, l.Limit)
			}
		}

		n.update(t, c, &runtimeapi.LinuxContainerResources{
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 8 << 20}},
		})
		reported := map[string]uint64{}
		for _, l := range n.containerStatus(t, c).GetResources().GetLinux().GetHugepageLimits() {
			reported[l.PageSize] = l.Limit
		}

		for size, limit := range want {
			if got := n.hugepageLimit(t, c, size); got != fmt.Sprint(limit) {
				t.Errorf("limit of %s pages after the update: %q, want %d", size, got, limit)
			}
		}

		if !maps.Equal(reported, want) {
			t.Errorf("ContainerStatus has %v, want %v", reported, want)
		}
	})
}

// TestOOMScoreIsClamped starts pods with low OOM scores on a node without CAP_SYS_RESOURCE. No
// process can get a score below the node's own there, and pods must still start (the kubelet
// requests -998 and -997).
func TestOOMScoreIsClamped(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{OomScoreAdj: -997}
		id := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
		got := strings.TrimSpace(n.exec(t, id, "cat", "/proc/1/oom_score_adj"))
		reported := n.containerStatus(t, id).GetResources().GetLinux().GetOomScoreAdj()
		if got != "-997" && got != "0" || fmt.Sprint(reported) != got {
			t.Errorf("oom_score_adj is %s, want -997 or 0; ContainerStatus has %d", got, reported)
		}

		n.update(t, id, &runtimeapi.LinuxContainerResources{OomScoreAdj: -500})
		if got := strings.TrimSpace(n.exec(t, id, "cat", "/proc/1/oom_score_adj")); got != "-500" && got != "0" {
			t.Errorf("oom_score_adj after the update: %s", got)
		}
	})
}
