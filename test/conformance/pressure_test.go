package conformance

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// someTotal matches the stall time of cpu.pressure and the like, in microseconds.
var someTotal = regexp.MustCompile(`(?m)^some .* total=(\d+)$`)

// TestPressure throttles a container and compares its pressure in the stats with the kernel's.
func TestPressure(t *testing.T) {
	needsPressure(t)
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cfg.Metadata.Uid = strings.TrimPrefix(cfg.Metadata.Uid, "uid-") // pod<UID> is the pod's control group
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("while :; do :; done & while :; do :; done"))
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000}
		id := n.startConfig(t, pod, cfg, cc)
		// kernel returns the stall time in nanoseconds, the unit of the CRI.
		kernel := func(file string) uint64 {
			t.Helper()
			out := n.run(t, "cat", filepath.Join("/sys/fs/cgroup", n.containerGroup(cfg, id), file))
			m := someTotal.FindStringSubmatch(out)
			if m == nil {
				t.Fatalf("%s: %s", file, out)
			}
			total, err := strconv.ParseUint(m[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return total * uint64(time.Microsecond)
		}

		eventually(t, "the container waits for the CPU", func() bool {
			return kernel("cpu.pressure") > uint64(100*time.Millisecond)
		})
		before := [...]uint64{kernel("cpu.pressure"), kernel("memory.pressure"), kernel("io.pressure")}
		s := n.stats(t, id)
		after := [...]uint64{kernel("cpu.pressure"), kernel("memory.pressure"), kernel("io.pressure")}
		for i, p := range []*runtimeapi.PsiStats{s.GetCpu().GetPsi(), s.GetMemory().GetPsi(), s.GetIo().GetPsi()} {
			name := [...]string{"CPU", "memory", "I/O"}[i]
			if p == nil || p.Some == nil || p.Full == nil {
				t.Errorf("pressure of %s is missing: %v", name, p)
				continue
			}
			if p.Some.Total < before[i] || p.Some.Total > after[i] {
				t.Errorf("pressure of %s: %d ns, the kernel had %d before and %d after", name, p.Some.Total,
					before[i], after[i])
			}
		}

		if s.Cpu.Psi.Some.Avg10 == 0 {
			t.Errorf("averages of the CPU pressure: %v", s.Cpu.Psi.Some)
		}

		podCPU := n.podStats(t, pod).GetCpu().GetPsi().GetSome().GetTotal()
		if podCPU < before[0] {
			t.Errorf("pressure of the pod is %d ns, less than %d ns of its container", podCPU, before[0])
		}

		m := n.metrics(t, pod, id)
		if v := m.value(t, "container_pressure_cpu_waiting_seconds_total"); v > after[0]/1e9+2 {
			t.Error(fmt.Sprint("container_pressure_cpu_waiting_seconds_total is ", v))
		}
	})
}
