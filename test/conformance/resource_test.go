package conformance

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kernelLimits returns the kernel's limits of a container on cgroup v1: shares, quota, memory,
// memory and swap, cpuset, and the OOM score of a child of its main process.
func (n *node) kernelLimits(t *testing.T, id string) string {
	t.Helper()
	return strings.Join(strings.Fields(n.exec(t, id, "sh", "-c",
		`cd /sys/fs/cgroup && cat cpu/cpu.shares cpu/cpu.cfs_quota_us \
		memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes cpuset/cpuset.cpus /proc/$(cat /child)/oom_score_adj`)), " ")
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
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{Unified: map[string]string{"memory.high": "1000"}}
		assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "config.linux.resources.unified")
	})
}

// TestHugepages limits huge pages like the kubelet: 0 for every page size of the node, more if a
// pod requests them.
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
				t.Errorf("limit without a hugetlb cgroup: %v, want FailedPrecondition", err)
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

		reported := map[string]uint64{}
		for _, l := range n.containerStatus(t, c).GetResources().GetLinux().GetHugepageLimits() {
			reported[l.PageSize] = l.Limit
		}

		if len(reported) != 2 || reported["1GB"] != 0 || reported["2MB"] != 8<<20 {
			t.Errorf("ContainerStatus has %v", reported)
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
