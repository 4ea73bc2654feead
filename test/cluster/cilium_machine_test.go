package cluster

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"cri-dockerd/test/nodes"
)

// machine is the state of the machine that nodes with Cilium must not change.
type machine struct {
	sysctls map[string]string // of the kernel, by name
	objects []string          // Cilium's BPF objects
	pins    []string          // below the machine's /sys/fs/bpf
}

// inspectMachine returns the current state.
func inspectMachine(t *testing.T) machine {
	t.Helper()
	return machine{
		sysctls: kernelSysctls(t),
		objects: ciliumObjects(t),
		pins:    glob(t, "/sys/fs/bpf/*"),
	}
}

// nodeGroup is the control group of a node in /proc/PID/cgroup.
var nodeGroup = regexp.MustCompile(`:/(cri-test-node-\w+)`)

// groupOf returns the name of a node's control group.
func groupOf(t *testing.T, n *nodes.Node) string {
	t.Helper()
	b, err := os.ReadFile(strings.TrimSuffix(n.Path(""), "/root") + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}

	m := nodeGroup.FindStringSubmatch(string(b))
	if m == nil {
		t.Fatalf("control groups of %s:\n%s", n.Name, b)
	}

	return m[1]
}

// counters are sysctls that the kernel itself changes.
var counters = []string{"hung_task_warnings", "ns_last_pid", "perf_event_max_sample_rate", "tainted"}

// kernelSysctls returns the readable sysctls in the directory that the agent may write to.
func kernelSysctls(t *testing.T) map[string]string {
	t.Helper()
	values := map[string]string{}
	for _, file := range glob(t, "/proc/sys/kernel/*") {
		name := filepath.Base(file)
		if b, err := os.ReadFile(file); err == nil && !slices.Contains(counters, name) {
			values[name] = strings.TrimSpace(string(b))
		}
	}

	for name := range shielded {
		if values[name] == "" {
			t.Fatalf("sysctl kernel.%s: no value", name)
		}
	}

	return values
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}

	return found
}

// ciliumObjects returns Cilium's BPF programs and maps in the kernel, of all nodes.
func ciliumObjects(t *testing.T) []string {
	t.Helper()
	var found []string
	for _, kind := range []string{"prog", "map"} {
		out, err := exec.Command("bpftool", "--json", kind, "show").Output()
		if err != nil {
			t.Fatalf("bpftool: %v", err)
		}

		var objects []struct {
			ID   int
			Name string
		}
		if err := json.Unmarshal(out, &objects); err != nil {
			t.Fatalf("bpftool: %v", err)
		}

		for _, o := range objects {
			if strings.HasPrefix(o.Name, "cil") || strings.HasPrefix(o.Name, "tail_") {
				found = append(found, fmt.Sprint(kind, " ", o.ID, " ", o.Name))
			}
		}
	}

	return found
}

// added returns the elements of now that before does not have.
func added(before, now []string) []string {
	return slices.DeleteFunc(slices.Clone(now), func(s string) bool { return slices.Contains(before, s) })
}

// testShield checks that the agents wrote their sysctls into the files of the nodes, that their
// programs are in the kernel, and that the machine has its own values.
func (ci *cilium) testShield(t *testing.T, c *cluster) {
	for _, n := range c.nodes {
		for name, want := range shielded {
			if got := strings.TrimSpace(n.Run(t, "cat", "/proc/sys/kernel/"+name)); got != want {
				t.Errorf("kernel.%s of %s: got %q, want the agent's %q", name, n.Name, got, want)
			}
		}
	}

	if now := inspectMachine(t); len(added(ci.machine.objects, now.objects)) == 0 {
		t.Error("the kernel has no BPF objects of Cilium: the check for remaining ones cannot find any")
	}

	ci.testSysctls(t)
}

func (ci *cilium) testSysctls(t *testing.T) {
	t.Helper()
	now := kernelSysctls(t)
	for _, name := range slices.Sorted(maps.Keys(ci.machine.sysctls)) {
		if want := ci.machine.sysctls[name]; now[name] != want && !isKubelets(name) {
			t.Errorf("kernel.%s of the machine: got %q, want %q as before the nodes", name, now[name], want)
		}
	}
}

// isKubelets reports whether the kubelet sets a sysctl of the machine, with every pod network.
func isKubelets(name string) bool { return slices.Contains([]string{"panic", "panic_on_oops"}, name) }

// removalTimeout is for the kernel, which frees the objects of a network namespace in the
// background.
const removalTimeout = 30 * time.Second

// testMachine checks that nothing of the removed nodes remains.
func (ci *cilium) testMachine(t *testing.T) {
	ci.testSysctls(t)
	var remaining []string
	for _, g := range ci.groups {
		remaining = append(remaining, glob(t, "/sys/fs/cgroup/"+g)...)
		remaining = append(remaining, glob(t, "/sys/fs/cgroup/*/"+g)...)
	}

	if len(ci.groups) == 0 || len(remaining) > 0 {
		t.Errorf("control groups of %q: %q remain", ci.groups, remaining)
	}

	for end := time.Now().Add(removalTimeout); time.Now().Before(end); time.Sleep(time.Second) {
		now := inspectMachine(t)
		remaining = slices.Concat(added(ci.machine.objects, now.objects), added(ci.machine.pins, now.pins))
		if len(remaining) == 0 {
			return
		}
	}

	t.Errorf("remains of Cilium on the machine:\n%s", strings.Join(remaining, "\n"))
}
