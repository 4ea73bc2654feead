package conformance

import (
	"fmt"
	"path"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestNestedGroups compares the stats of a container with the kernel's while its init moves to a
// nested cgroup and starts processes in others, like docker-in-docker and systemd.
func TestNestedGroups(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Linux.CgroupParent = n.cgroupParent("pod" + cfg.Metadata.Uid)
		cfg.Linux.SecurityContext.Privileged = true
		pod := n.runPod(t, cfg)

		for name, groups := range map[string][2]string{
			"docker":  {"init", "docker/0123456789abcdef"},
			"systemd": {"init.scope", "system.slice/app.service"},
		} {
			t.Run(name, func(t *testing.T) { testNestedGroups(t, n, pod, cfg, name, groups[0], groups[1]) })
		}
	})
}

// nestedGroups is a script with the groups of its init and of its other process, and the parent of
// the latter. On cgroup v2, inner groups have controllers and no processes.
const nestedGroups = `cd /sys/fs/cgroup
	if [ -e cgroup.procs ]; then
		hierarchies=.
		mkdir -p %[1]s %[2]s && echo 1 > %[1]s/cgroup.procs
		for g in . %[3]s; do echo +memory +cpu > $g/cgroup.subtree_control; done
	else
		hierarchies=$(ls)
		for h in $hierarchies; do
			mkdir -p $h/%[1]s $h/%[2]s 2>/dev/null && echo 1 > $h/%[1]s/cgroup.procs
		done 2>/dev/null
	fi
	export hierarchies
	sh -c 'for h in $hierarchies; do echo $$ > $h/%[2]s/cgroup.procs; done 2>/dev/null
		mount -t tmpfs none /dev/shm && dd if=/dev/zero of=/dev/shm/used bs=1M count=100 2>/dev/null
		touch /ready; while :; do for i in $(seq 500); do :; done; sleep 0.1; done' &
	while :; do sleep 1; done`

// testNestedGroups runs an init that moves to another cgroup, and a process in a sibling group that
// uses memory and CPU. The init stays where it is in the cpuset hierarchy, because a cpuset without
// CPUs takes no process.
func testNestedGroups(
	t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig, name, initGroup, appGroup string,
) {
	cc := n.containerConfig(sh(fmt.Sprintf(nestedGroups, initGroup, appGroup, path.Dir(appGroup))))
	cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
	cc.Linux.SecurityContext.Privileged = true
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 256 * mib}

	id := n.startConfig(t, pod, cfg, cc)
	eventually(t, "use of memory", func() bool {
		r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: id,
			Cmd:         []string{"test", "-e", "/ready"},
			Timeout:     10,
		})
		return err == nil && r.ExitCode == 0
	})

	execGroup, entry := "", ":memory:"
	if n.hasV2(t) { // runc uses the group of the init if that of the container takes no process
		execGroup, entry = "/"+initGroup, "^0:"
	}

	for file, want := range map[string]string{"1": "/" + initGroup, "self": execGroup} {
		got := n.exec(t, id, "sh", "-c",
			"grep "+entry+" /proc/"+file+"/cgroup | sed 's/^[^:]*:[^:]*://; s/.*"+id+"[^/]*//'")
		if got != want+"\n" {
			t.Errorf("process %s is in cgroup %q of its container, want %q", file, got, want)
		}
	}

	low := n.cgroupMemory(t, id)
	m := n.stats(t, id).Memory
	high := n.cgroupMemory(t, id)
	low, high = min(low, high), max(low, high)
	// The kernel charges up to 64 pages ahead on each processor (MEMCG_CHARGE_BATCH,
	// mm/memcontrol.c), and the exec above has just ended.
	if used := m.UsageBytes.GetValue(); used < low*99/100 || used > high*101/100 {
		t.Errorf("memory %d, the kernel has %d to %d", used, low, high)
	}
	if m.UsageBytes.GetValue() < 100*mib || m.AvailableBytes.GetValue()+m.WorkingSetBytes.GetValue() != 256*mib {
		t.Errorf("memory stats: %v", m)
	}

	before := n.cgroupCPUTime(t, id)
	used := n.stats(t, id).Cpu.UsageCoreNanoSeconds.GetValue()
	after := n.cgroupCPUTime(t, id)
	if used < before || used > after || used == 0 {
		t.Errorf("CPU time %d, the kernel had %d before and %d after", used, before, after)
	}

	low = n.cgroupMemory(t, id)
	podUses := n.podStats(t, pod).Memory.UsageBytes.GetValue()
	low = min(low, n.cgroupMemory(t, id))
	if podUses < low*99/100 {
		t.Errorf("the pod uses %d bytes, less than %d of its container", podUses, low)
	}

	n.stop(t, id, 0)
}
