package bundle

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"cri-dockerd/internal/shim/adjustment"
	"cri-dockerd/internal/shim/annotation"
)

// adjusted returns the spec after Apply with these adjustments of plugins. Without adjustments
// there is no file.
func adjusted(t *testing.T, spec m, a *api.ContainerAdjustment, isPod bool) (m, error) {
	t.Helper()
	id, root := strings.Repeat("ab", 32), t.TempDir()
	files := filepath.Join(root, "nri")
	want, err := annotation.Container{
		Adjustments: &annotation.Adjustments{Directory: files, IsPod: isPod},
	}.Encode()
	spec["annotations"] = m{annotation.Key: want}
	text, jsonErr := json.Marshal(spec)
	dir := filepath.Join(root, id)
	err = errors.Join(err, jsonErr, os.Mkdir(files, 0o700), os.Mkdir(dir, 0o700),
		os.WriteFile(filepath.Join(dir, file), text, 0o600))
	if a != nil {
		content, encodeErr := adjustment.Encode(a)
		err = errors.Join(err, encodeErr, os.WriteFile(filepath.Join(files, id), content, 0o600))
	}

	if err != nil {
		t.Fatal(err)
	}

	b, err := Open(dir)
	if err == nil {
		err = b.Apply(func(string) bool { return true }, nil)
	}

	if err != nil {
		return nil, err
	}

	text, err = os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}

	return decodeObject(text)
}

func adjustableSpec() m {
	return m{
		"future": m{"kept": 9007199254740993},
		"process": m{
			"args":    []string{"sh"},
			"env":     []string{"A=1", "B=2"},
			"cwd":     "/",
			"future":  true,
			"rlimits": []m{{"type": "RLIMIT_NOFILE", "hard": 10, "soft": 10}},
		},
		"mounts": []m{{"destination": "/old", "source": "/tmp", "type": "bind"}},
		"linux":  m{"resources": m{"future": 1, "memory": m{"limit": 9223372036854771712}}},
	}
}

// adjustments has one adjustment of each kind.
func adjustments() map[string]adjustmentTest {
	return map[string]adjustmentTest{
		"env": {
			&api.ContainerAdjustment{Env: []*api.KeyValue{{Key: "A", Value: "x"}, {Key: "-B"}, {Key: "C", Value: "y"}}},
			"process.env", `["A=x","C=y"]`,
		},
		"rlimits": {
			&api.ContainerAdjustment{Rlimits: []*api.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 20, Soft: 15}}},
			"process.rlimits", `[{"hard":20,"soft":15,"type":"RLIMIT_NOFILE"}]`,
		},
		"mounts": {
			&api.ContainerAdjustment{Mounts: []*api.Mount{
				{Destination: "-/old"},
				{Destination: "/new", Source: "/src", Type: "bind", Options: []string{"ro"}},
			}},
			"mounts", `[{"destination":"/new","options":["ro"],"source":"/src","type":"bind"}]`,
		},
		"hooks": {
			&api.ContainerAdjustment{Hooks: &api.Hooks{CreateRuntime: []*api.Hook{{Path: "/h", Args: []string{"h"}}}}},
			"hooks.createRuntime", `[{"args":["h"],"path":"/h"}]`,
		},
		"devices": {
			linux(&api.LinuxContainerAdjustment{
				Devices: []*api.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: 3}},
			}),
			"linux.devices", `[{"major":1,"minor":3,"path":"/dev/x","type":"c"}]`,
		},
		"sysctl": {
			linux(&api.LinuxContainerAdjustment{Sysctl: map[string]string{"net.x": "1"}}),
			"linux.sysctl", `{"net.x":"1"}`,
		},
		"cgroups path": {linux(&api.LinuxContainerAdjustment{CgroupsPath: "/x"}), "linux.cgroupsPath", `"/x"`},
		"I/O priority": {
			linux(&api.LinuxContainerAdjustment{IoPriority: &api.LinuxIOPriority{
				Class:    api.IOPrioClass_IOPRIO_CLASS_IDLE,
				Priority: 3,
			}}),
			"process.ioPriority", `{"class":"IOPRIO_CLASS_IDLE","priority":3}`,
		},
		"scheduler": {
			linux(&api.LinuxContainerAdjustment{Scheduler: &api.LinuxScheduler{
				Policy: api.LinuxSchedulerPolicy_SCHED_BATCH,
				Nice:   2,
			}}),
			"process.scheduler", `{"nice":2,"policy":"SCHED_BATCH"}`,
		},
		"namespaces": {
			linux(&api.LinuxContainerAdjustment{Namespaces: []*api.LinuxNamespace{{Type: "uts", Path: "/p"}}}),
			"linux.namespaces", `[{"path":"/p","type":"uts"}]`,
		},
		"seccomp": {
			linux(&api.LinuxContainerAdjustment{SeccompPolicy: &api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW"}}),
			"linux.seccomp", `{"defaultAction":"SCMP_ACT_ALLOW"}`,
		},
		"CPUs": {
			resources(&api.LinuxResources{Cpu: &api.LinuxCPU{Cpus: "0", Shares: api.UInt64(7)}}),
			"linux.resources.cpu", `{"cpus":"0","shares":7}`,
		},
		"memory": {
			resources(&api.LinuxResources{
				Memory: &api.LinuxMemory{Reservation: api.Int64(5), Swappiness: api.UInt64(1)},
			}),
			"linux.resources.memory", `{"limit":9223372036854771712,"reservation":5,"swappiness":1}`,
		},
		"pids": {
			resources(&api.LinuxResources{Pids: &api.LinuxPids{Limit: 9}}), "linux.resources.pids", `{"limit":9}`,
		},
		"unified": {
			resources(&api.LinuxResources{Unified: map[string]string{"memory.high": "9"}}),
			"linux.resources.unified", `{"memory.high":"9"}`,
		},
		"huge pages": {
			resources(&api.LinuxResources{HugepageLimits: []*api.HugepageLimit{{PageSize: "2MB", Limit: 4}}}),
			"linux.resources.hugepageLimits", `[{"limit":4,"pageSize":"2MB"}]`,
		},
	}
}

type adjustmentTest struct {
	adjust *api.ContainerAdjustment
	path   string // of the changed value
	want   string // as JSON
}

// TestAdjustments applies one adjustment of each kind.
func TestAdjustments(t *testing.T) {
	tests := adjustments()
	tests["args"] = adjustmentTest{&api.ContainerAdjustment{Args: []string{"true"}}, "process.args", `["true"]`}
	tests["block I/O class"] = adjustmentTest{
		resources(&api.LinuxResources{
			BlockioClass: api.String(`{"weight":50,"throttleReadBpsDevice":[{"major":8,"minor":16,"rate":9}]}`),
		}),
		"linux.resources.blockIO", `{"throttleReadBpsDevice":[{"major":8,"minor":16,"rate":9}],"weight":50}`,
	}
	tests["OOM score"] = adjustmentTest{
		linux(&api.LinuxContainerAdjustment{OomScoreAdj: api.Int(500)}), "process.oomScoreAdj", `500`,
	}

	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := adjusted(t, adjustableSpec(), tt.adjust, false)
			if err != nil {
				t.Fatal(err)
			}

			if diff := cmp.Diff(tt.want, at(t, got, tt.path)); diff != "" {
				t.Error(diff)
			}

			for path, want := range map[string]string{
				"future.kept": "9007199254740993", "process.future": "true", "linux.resources.future": "1",
			} {
				if value := at(t, got, path); value != want {
					t.Errorf("unknown field %s is %s, want %s", path, value, want)
				}
			}
		})
	}
}

func linux(l *api.LinuxContainerAdjustment) *api.ContainerAdjustment {
	return &api.ContainerAdjustment{Linux: l}
}

func resources(r *api.LinuxResources) *api.ContainerAdjustment {
	return linux(&api.LinuxContainerAdjustment{Resources: r})
}

// at returns the JSON of the value at a path of keys.
func at(t *testing.T, o m, path string) string {
	t.Helper()
	var value any = o
	for key := range strings.SplitSeq(path, ".") {
		value = value.(m)[key]
	}

	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}

	return string(text)
}

// TestRDT applies RDT classes to a spec. They fail on a node without RDT.
func TestRDT(t *testing.T) {
	for name, test := range map[string]struct {
		adjust *api.ContainerAdjustment
		want   *specs.LinuxIntelRdt
	}{
		"class": {
			resources(&api.LinuxResources{RdtClass: api.String("gold")}),
			&specs.LinuxIntelRdt{ClosID: "gold"},
		},
		"RDT": {
			linux(&api.LinuxContainerAdjustment{Rdt: &api.LinuxRdt{
				ClosId:           api.String("gold"),
				Schemata:         api.RepeatedString([]string{"MB:0=50"}),
				EnableMonitoring: api.Bool(true),
			}}),
			&specs.LinuxIntelRdt{ClosID: "gold", Schemata: []string{"MB:0=50"}, EnableMonitoring: true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			spec := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
			if _, err := adjustSpec(spec, test.adjust); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, spec.Linux.IntelRdt); diff != "" {
				t.Error(diff)
			}

			_, err := adjusted(t, adjustableSpec(), test.adjust, false)
			if _, statErr := os.Stat("/sys/fs/resctrl/schemata"); (statErr == nil) != (err == nil) ||
				err != nil && !strings.Contains(err.Error(), "mount of the file system resctrl") {
				t.Errorf("error %v; resctrl: %v", err, statErr)
			}
		})
	}
}

// TestUnsupportedAdjustmentsFail checks that no adjustment is left out without an error.
func TestUnsupportedAdjustmentsFail(t *testing.T) {
	for name, a := range map[string]*api.ContainerAdjustment{
		"CDI devices":       {CDIDevices: []*api.CDIDevice{{Name: "a/b=c"}}},
		"block I/O class":   resources(&api.LinuxResources{BlockioClass: api.String("x")}), // only its name
		"unknown namespace": linux(&api.LinuxContainerAdjustment{Namespaces: []*api.LinuxNamespace{{Type: "x"}}}),
		"missing file":      nil,
		"shared mount source": {
			Mounts: []*api.Mount{{Destination: "/x", Source: "/proc/self", Options: []string{"rshared"}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := adjusted(t, adjustableSpec(), a, false); err == nil {
				t.Errorf("the spec is %v, want an error", got)
			}
		})
	}
}

// TestAPauseHasNoAdjustments opens the bundle of a pause: it has no file.
func TestAPauseHasNoAdjustments(t *testing.T) {
	got, err := adjusted(t, adjustableSpec(), nil, true)
	if err != nil {
		t.Fatal(err)
	}
	if args := at(t, got, "process.args"); args != `["sh"]` {
		t.Errorf("the arguments are %s", args)
	}
}
