package sandbox

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/cgroups/v3"
	"github.com/coreos/go-systemd/v22/dbus"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestScopePath(t *testing.T) {
	for in, want := range map[string]string{
		"system.slice:docker:0123": "/system.slice/docker-0123.scope",
		":docker:0123":             "/system.slice/docker-0123.scope",
		"-.slice:docker:0123":      "/docker-0123.scope",
		"kubepods-burstable-pod1_2.slice:docker:0123": "/kubepods.slice/kubepods-burstable.slice/" +
			"kubepods-burstable-pod1_2.slice/docker-0123.scope",
		"a.slice:docker":      "",
		"a.slice:docker:":     "",
		"a.slice::b":          "",
		"a:docker:b":          "",
		"a--b.slice:docker:b": "",
		"../a.slice:docker:b": "",
		"a.slice:docker:../b": "",
		"a.slice:docker:" + strings.Repeat("b", 255): "",
		"/docker/b": "",
	} {
		t.Run(in, func(t *testing.T) {
			got, err := scopePath(in)
			if (err == nil) != (want != "") || err == nil && got != want {
				t.Errorf("path %q, %v; want %q", got, err, want)
			}
		})
	}
}

func TestPlanOfAScope(t *testing.T) {
	b := newBundle()
	b.Spec.Linux.CgroupsPath = "kubepods-pod1.slice:docker:bundle"
	p, reason := NewPlan(b)
	if reason != "" || p.cgroup != "/kubepods.slice/kubepods-pod1.slice/docker-bundle.scope" {
		t.Errorf("plan %+v, reason %q", p, reason)
	}
}

// TestLimitProperties checks the limits that systemd keeps, by cgroup version.
func TestLimitProperties(t *testing.T) {
	shares, memory, pids := uint64(2), int64(1<<30), int64(7)
	limits := &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: &shares},
		Memory: &specs.LinuxMemory{Limit: &memory},
		Pids:   &specs.LinuxPids{Limit: &pids},
	}
	for unified, want := range map[bool]string{
		false: "CPUShares=@t 2 MemoryLimit=@t 1073741824 TasksMax=@t 7",
		true:  "CPUWeight=@t 1 MemoryMax=@t 1073741824 TasksMax=@t 7",
	} {
		t.Run(fmt.Sprint(unified), func(t *testing.T) {
			var got []string
			for _, p := range limitProperties(limits, unified) {
				got = append(got, p.Name+"="+p.Value.String())
			}
			if strings.Join(got, " ") != want {
				t.Errorf("properties %s, want %s", got, want)
			}
		})
	}

	if got := limitProperties(nil, true); len(got) > 0 {
		t.Errorf("properties without limits: %v", got)
	}
}

func TestPropertiesOfAScope(t *testing.T) {
	s := scope{path: "/a.slice/a-b.slice/docker-0123.scope"}
	all := map[string]dbus.Property{}
	for _, p := range s.properties(42) {
		all[p.Name] = p
	}
	if got := all["Slice"].Value.Value(); got != "a-b.slice" {
		t.Errorf("slice %v", got)
	}
	if got := fmt.Sprint(all["PIDs"].Value.Value()); got != "[42]" {
		t.Errorf("PIDs %s", got)
	}
	if got := all["Delegate"].Value.Value(); got != true {
		t.Errorf("Delegate %v", got)
	}
	for name, want := range map[string]any{"DevicePolicy": "closed", "BlockIOAccounting": true} {
		p, ok := all[name]
		if unified := cgroups.Mode() == cgroups.Unified; ok == unified || ok && p.Value.Value() != want {
			t.Errorf("%s %v with cgroup v2 %v, want %v with cgroup v1 only", name, p.Value, unified, want)
		}
	}
}
