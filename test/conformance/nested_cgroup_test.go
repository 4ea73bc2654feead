package conformance

import (
	"fmt"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestNestedGroups: the stats of a container are those of all of it as the kernel counts them, also
// when its init moves to a group of its own and starts others beside it: as docker-in-docker, as
// systemd.
func TestNestedGroups(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.needsV1(t)
		cfg := n.podConfig(t)
		cfg.Linux.CgroupParent = n.cgroupRoot() + "/pod" + cfg.Metadata.Uid
		cfg.Linux.SecurityContext.Privileged = true
		pod := n.runPod(t, cfg)
		for name, groups := range map[string][2]string{
			"docker":  {"init", "docker/0123456789abcdef"},
			"systemd": {"init.scope", "system.slice/app.service"},
		} {
			t.Run(name, func(t *testing.T) { nestedGroups(t, n, pod, cfg, name, groups[0], groups[1]) })
		}
	})
}

// nestedGroups has an init move on and a process beside it use memory and CPU. cpuset takes no
// process into a group without CPUs, so in that hierarchy it stays.
func nestedGroups(
	t *testing.T, n *node, pod string, cfg *runtimeapi.PodSandboxConfig, name, initGroup, appGroup string,
) {
	const script = `cd /sys/fs/cgroup && for h in *; do
			mkdir -p $h/%[1]s $h/%[2]s 2>/dev/null && echo 1 > $h/%[1]s/cgroup.procs
		done 2>/dev/null
		sh -c 'for h in *; do echo $$ > $h/%[2]s/cgroup.procs; done 2>/dev/null
			mount -t tmpfs none /dev/shm && dd if=/dev/zero of=/dev/shm/used bs=1M count=100 2>/dev/null; touch /ready; while :; do :; done' &
		while :; do sleep 1; done`

	cc := n.containerConfig(sh(fmt.Sprintf(script, initGroup, appGroup)))
	cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
	cc.Linux.SecurityContext.Privileged = true
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{
		MemoryLimitInBytes: 256 * mib,
		CpuPeriod:          100000,
		CpuQuota:           20000,
	}

	id := n.startConfig(t, pod, cfg, cc)
	eventually(t, "it uses memory", func() bool {
		r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: id,
			Cmd:         []string{"test", "-e", "/ready"},
			Timeout:     10,
		})
		return err == nil && r.ExitCode == 0
	})

	for file, want := range map[string]string{"1": "/" + initGroup, "self": ""} {
		if got := n.exec(t, id, "sh", "-c", "grep :memory: /proc/"+file+"/cgroup | sed 's/.*"+id+"//'"); got != want+
			"\n" {
			t.Errorf("process %s is in %q of its container, want %q", file, got, want)
		}
	}

	low := n.memory(t, id)
	m := n.stats(t, id).Memory
	high := n.memory(t, id)
	low, high = min(low, high), max(low, high)
	// The kernel charges up to 64 pages ahead on each processor (MEMCG_CHARGE_BATCH,
	// mm/memcontrol.c), and the exec above has just ended.
	if used := m.UsageBytes.GetValue(); used < low*99/100 || used > high*101/100 {
		t.Errorf("memory: %d, the kernel says %d to %d", used, low, high)
	}
	if m.UsageBytes.GetValue() < 100*mib || m.AvailableBytes.GetValue()+m.WorkingSetBytes.GetValue() != 256*mib {
		t.Errorf("memory: %v", m)
	}

	before := n.cpuTime(t, id)
	used := n.stats(t, id).Cpu.UsageCoreNanoSeconds.GetValue()
	after := n.cpuTime(t, id)
	if used < before || used > after || used == 0 {
		t.Errorf("CPU time %d, the kernel says %d and then %d", used, before, after)
	}

	low = n.memory(t, id)
	podUses := n.podStats(t, pod).Memory.UsageBytes.GetValue()
	low = min(low, n.memory(t, id))
	if podUses < low*99/100 {
		t.Errorf("the pod uses %d, less than its container with %d", podUses, low)
	}

	n.stop(t, id, 0)
}
