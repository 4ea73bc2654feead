package conformance

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// limits are what the kernel says of a container on cgroup v1: shares, quota, memory, memory and
// swap, cpuset, and the OOM score of a process that its main process has started.
func (n *node) limits(t *testing.T, id string) string {
	t.Helper()
	return strings.Join(strings.Fields(n.exec(t, id, "sh", "-c",
		`cd /sys/fs/cgroup && cat cpu/cpu.shares cpu/cpu.cfs_quota_us \
		memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes cpuset/cpuset.cpus /proc/$(cat /child)/oom_score_adj`)), " ")
}

// parent is a container whose main process has a child, whose PID lies in /child.
func (n *node) parent() *runtimeapi.ContainerConfig {
	return n.containerConfig(sh("sleep 1000 & echo $! > /child; wait"))
}

func (n *node) update(t *testing.T, id string, r *runtimeapi.LinuxContainerResources) {
	t.Helper()
	if _, err := n.Runtime.UpdateContainerResources(t.Context(),
		&runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: r}); err != nil {
		t.Errorf("UpdateContainerResources %v: %v", r, err)
	}
}

func TestResources(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.needsV1(t)
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
		eventually(t, "the child runs", func() bool {
			return n.exec(t, id, "sh", "-c", "cat /child 2>/dev/null || true") != ""
		})
		const mib = 1 << 20
		for _, step := range []struct {
			name string
			r    *runtimeapi.LinuxContainerResources // nil at the start
			want string
		}{
			{"as created", cc.Linux.Resources, fmt.Sprint(512, 50000, 64*mib, 64*mib, " 0 ", 500)},
			{"CPU and memory", &runtimeapi.LinuxContainerResources{
				CpuShares:          256,
				CpuPeriod:          100000,
				CpuQuota:           20000,
				MemoryLimitInBytes: 128 * mib,
			}, fmt.Sprint(256, 20000, 128*mib, 128*mib, " 0 ", 500)},
			{"less memory", &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 96 * mib},
				fmt.Sprint(256, 20000, 96*mib, 96*mib, " 0 ", 500)},
			{"swap", &runtimeapi.LinuxContainerResources{
				MemoryLimitInBytes:     96 * mib,
				MemorySwapLimitInBytes: 160 * mib,
			}, fmt.Sprint(256, 20000, 96*mib, 160*mib, " 0 ", 500)},
			{"cpuset", &runtimeapi.LinuxContainerResources{CpusetCpus: "0-1"},
				fmt.Sprint(256, 20000, 96*mib, 160*mib, " 0-1 ", 500)},
			{"no quota", &runtimeapi.LinuxContainerResources{CpuQuota: -1},
				fmt.Sprint(256, -1, 96*mib, 160*mib, " 0-1 ", 500)},
			{"OOM score", &runtimeapi.LinuxContainerResources{OomScoreAdj: 321},
				fmt.Sprint(256, -1, 96*mib, 160*mib, " 0-1 ", 321)},
			{"nothing", &runtimeapi.LinuxContainerResources{}, fmt.Sprint(256, -1, 96*mib, 160*mib, " 0-1 ", 321)},
			{"no part at all", nil, fmt.Sprint(256, -1, 96*mib, 160*mib, " 0-1 ", 321)},
		} {
			if step.name != "as created" {
				n.update(t, id, step.r)
			}
			if got := n.limits(t, id); got != step.want {
				t.Errorf("%s: the kernel says %q, want %q", step.name, got, step.want)
			}

			r := n.containerStatus(t, id).GetResources().GetLinux()
			said := fmt.Sprint(r.GetCpuShares(), r.GetCpuQuota(), r.GetMemoryLimitInBytes(),
				r.GetMemorySwapLimitInBytes(), " "+r.GetCpusetCpus()+" ", r.GetOomScoreAdj())
			if said != step.want {
				t.Errorf("%s: ContainerStatus says %q, want %q", step.name, said, step.want)
			}
		}
	})
}

// TestUpdateOfWhatCannotBe refuses by name what this node does not have, and leaves the container
// as it was.
func TestUpdateOfWhatCannotBe(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.needsV1(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		for field, r := range map[string]*runtimeapi.LinuxContainerResources{
			"linux.unified": {Unified: map[string]string{"memory.high": "1000"}},
			"linux.hugepage_limits[0].page_size": {
				HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2 megabytes"}},
			},
			"linux.oom_score_adj": {OomScoreAdj: -1001},
			"linux.cpu_period":    {CpuPeriod: -1},
		} {
			_, err := n.Runtime.UpdateContainerResources(t.Context(),
				&runtimeapi.UpdateContainerResourcesRequest{ContainerId: c, Linux: r})
			refused(t, err, field)
		}

		_, err := n.Runtime.UpdateContainerResources(t.Context(),
			&runtimeapi.UpdateContainerResourcesRequest{
				ContainerId: strings.Repeat("0", 64),
				Linux:       &runtimeapi.LinuxContainerResources{CpuShares: 3},
			})
		if status.Code(err) != codes.NotFound {
			t.Errorf("an unknown container: %v", err)
		}

		cc := n.containerConfig(sh("true"))
		cc.Metadata.Name = "unified"
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.high": "1000"}}
		refused(t, n.createErr(t, pod, cfg, cc), "config.linux.resources.unified")
	})
}

// TestHugepages limits huge pages as the kubelet does for every container: 0 for every size of the
// node, more where a pod asks.
func TestHugepages(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.needsV1(t)
		cfg := n.podConfig(t)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "1GB"}, {PageSize: "2MB", Limit: 4 << 20}},
		}
		pod := n.runPod(t, cfg)
		if n.run(t, "sh", "-c", "ls -d /sys/fs/cgroup/hugetlb 2>/dev/null || true") == "" {
			c := n.create(t, pod, cfg, cc)
			_, err := n.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c})
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "hugepage_limits[2MB]") {
				t.Errorf("a limit that this machine cannot keep: %v", err)
			}
			return
		}

		c := n.startConfig(t, pod, cfg, cc)
		read := func() string {
			return strings.Join(strings.Fields(n.exec(t, c, "sh", "-c",
				"cd /sys/fs/cgroup/hugetlb && cat hugetlb.1GB.limit_in_bytes hugetlb.2MB.limit_in_bytes")), " ")
		}
		if got := read(); got != "0 4194304" {
			t.Errorf("limits: %q", got)
		}

		n.update(t, c, &runtimeapi.LinuxContainerResources{
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 8 << 20}},
		})
		if got := read(); got != "0 8388608" {
			t.Errorf("limits after the update: %q", got)
		}

		said := map[string]uint64{}
		for _, l := range n.containerStatus(t, c).GetResources().GetLinux().GetHugepageLimits() {
			said[l.PageSize] = l.Limit
		}

		if len(said) != 2 || said["1GB"] != 0 || said["2MB"] != 8<<20 {
			t.Errorf("ContainerStatus says %v", said)
		}
	})
}

// TestOOMScoreIsClamped: where CAP_SYS_RESOURCE is missing no process can get a score below the
// node's own, and pods must start all the same (the kubelet asks for -998 and -997).
func TestOOMScoreIsClamped(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{OomScoreAdj: -997}
		id := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
		got := strings.TrimSpace(n.exec(t, id, "cat", "/proc/1/oom_score_adj"))
		if said := n.containerStatus(t, id).GetResources().GetLinux().GetOomScoreAdj(); got != "-997" && got != "0" ||
			fmt.Sprint(said) != got {
			t.Errorf("oom_score_adj is %s, ContainerStatus says %d", got, said)
		}

		n.update(t, id, &runtimeapi.LinuxContainerResources{OomScoreAdj: -500})
		if got := strings.TrimSpace(n.exec(t, id, "cat", "/proc/1/oom_score_adj")); got != "-500" && got != "0" {
			t.Errorf("oom_score_adj after the update: %s", got)
		}
	})
}
