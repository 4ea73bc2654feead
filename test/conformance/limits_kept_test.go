package conformance

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// unit is the unit of the daemon in the packages.
const unit = "cri-docker.service"

// limitedContainer is a running container with limits beyond Docker's API.
type limitedContainer struct {
	*node
	id    string
	group string            // directory of its control group
	want  map[string]string // by file
}

// newLimited starts a container with limits: as requested, and no swap as the consequence of equal
// limits of memory and swap.
func newLimited(t *testing.T, n *node, name string, unified map[string]string) *limitedContainer {
	t.Helper()
	cfg := n.podConfig(t)
	cc := n.containerConfig(sh("sleep 100000"))
	cc.Metadata.Name = name
	cc.Linux.Resources = &runtimeapi.LinuxContainerResources{
		CpuShares:          512,
		MemoryLimitInBytes: 64 * mib,
		Unified:            unified,
	}

	c := &limitedContainer{node: n, id: n.startConfig(t, n.runPod(t, cfg), cfg, cc), want: maps.Clone(unified)}
	if c.want == nil {
		c.want = map[string]string{}
	}
	c.checkStatus(t, "right after the start")

	if _, ok := unified["memory.swap.max"]; !ok {
		c.want["memory.swap.max"] = "0"
	}

	pid := strings.TrimSpace(n.docker(t, "inspect", "--format", "{{.State.Pid}}", c.id))
	b, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	c.group = "/sys/fs/cgroup" + strings.TrimPrefix(strings.TrimSpace(string(b)), "0::")
	c.check(t, "right after the start")

	return c
}

// differences returns the files without their value.
func (c *limitedContainer) differences(t *testing.T) string {
	t.Helper()
	var out []string
	for _, file := range slices.Sorted(maps.Keys(c.want)) {
		b, err := os.ReadFile(filepath.Join(c.group, file))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(string(b)); got != c.want[file] {
			out = append(out, fmt.Sprintf("%s has %s instead of %s", file, got, c.want[file]))
		}
	}

	return strings.Join(out, ", ")
}

// check expects all limits now.
func (c *limitedContainer) check(t *testing.T, when string) {
	t.Helper()
	if d := c.differences(t); d != "" {
		t.Errorf("%s: %s", when, d)
	}
	c.checkStatus(t, when)
}

// checkStatus compares the requested limits with ContainerStatus.
func (c *limitedContainer) checkStatus(t *testing.T, when string) {
	t.Helper()
	got := c.containerStatus(t, c.id).GetResources().GetLinux().GetUnified()
	for file, value := range got {
		if value != c.want[file] {
			t.Errorf("%s: ContainerStatus has %s of %s, want %s", when, file, value, c.want[file])
		}
	}
	if len(got) == 0 && len(c.want) > 1 {
		t.Errorf("%s: ContainerStatus has no limits", when)
	}
}

// checkSoon expects limits with a property now, and the others after the daemon has noticed.
func (c *limitedContainer) checkSoon(t *testing.T, when string) {
	t.Helper()
	kept := maps.Clone(c.want)
	c.want = maps.Clone(kept)
	delete(c.want, "memory.oom.group") // not a property
	if d := c.differences(t); d != "" {
		t.Errorf("%s, at once: %s", when, d)
	}

	c.want = kept
	if !within(20*time.Second, func() bool { return c.differences(t) == "" }) {
		t.Errorf("%s: %s", when, c.differences(t))
	}
	c.checkStatus(t, when)
}

// TestLimitsAreKept: limits beyond Docker's API survive whatever makes systemd or the OCI runtime
// write the control group. It runs alone, because it restarts the daemon.
func TestLimitsAreKept(t *testing.T) {
	n := ownedBySystemd(t)
	c := newLimited(t, n, "limited", map[string]string{
		"memory.high":      fmt.Sprint(48 * mib),
		"memory.low":       fmt.Sprint(8 * mib),
		"memory.min":       fmt.Sprint(4 * mib),
		"memory.oom.group": "1",
		"pids.max":         "1000",
	})
	plain := newLimited(t, n, "plain", nil) // no swap, which the OCI runtime writes as a file only

	steps := []struct {
		name string
		do   func(t *testing.T)
		soon bool // without a call of the CRI to wait for
	}{
		{"daemon-reload", func(t *testing.T) { n.run(t, "systemctl", "daemon-reload") }, true},
		{"daemon-reexec", n.reexec, true},
		{"update of others", func(t *testing.T) {
			for _, c := range []*limitedContainer{c, plain} {
				n.update(t, c.id, &runtimeapi.LinuxContainerResources{CpusetCpus: "0"})
			}
		}, false},
		{"update", func(t *testing.T) {
			c.want["memory.high"] = fmt.Sprint(40 * mib)
			n.update(t, c.id, &runtimeapi.LinuxContainerResources{
				Unified: map[string]string{"memory.high": c.want["memory.high"]},
			})
		}, false},
		{"update of memory", func(t *testing.T) {
			for _, c := range []*limitedContainer{c, plain} {
				n.update(t, c.id, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 96 * mib})
			}
		}, false},
		{"docker update", func(t *testing.T) {
			n.docker(t, "update", "--cpu-shares=300", "--memory=80m", "--memory-swap=80m", c.id, plain.id)
		}, true},
		{"second daemon-reload", func(t *testing.T) { n.run(t, "systemctl", "daemon-reload") }, true},
		{"restart of the daemon", n.restartUnit, true},
		{"second daemon-reexec", n.reexec, true},
	}

	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			step.do(t)
			for _, c := range []*limitedContainer{c, plain} {
				if step.soon {
					c.checkSoon(t, step.name)
				}
				c.check(t, step.name)
			}
		})
	}
}

// reexec starts systemd again and waits until it answers.
func (n *node) reexec(t *testing.T) {
	t.Helper()
	n.run(t, "systemctl", "daemon-reexec")
	if !within(time.Minute, func() bool {
		return n.own(t).Command("systemctl", "show", "--property=Version").Run() == nil
	}) {
		t.Fatal("systemd does not answer after the reexecution")
	}
}

// restartUnit reloads systemd while the daemon is stopped.
func (n *node) restartUnit(t *testing.T) {
	t.Helper()
	n.needsUnit(t, unit)
	n.run(t, "systemctl", "stop", unit)
	n.run(t, "systemctl", "daemon-reload")
	n.run(t, "systemctl", "start", unit)
}
