package nri

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

var testID = model.ContainerID(strings.Repeat("0c", 32))

// TestEmptyAdjustments: NRI's library returns empty parts for plugins without adjustments.
func TestEmptyAdjustments(t *testing.T) {
	for name, m := range map[string]*api.ContainerAdjustment{
		"nil":   nil,
		"empty": {},
		"empty parts": {Hooks: &api.Hooks{}, Linux: &api.LinuxContainerAdjustment{
			Resources: &api.LinuxResources{Memory: &api.LinuxMemory{}, Cpu: &api.LinuxCPU{}},
			Rdt:       &api.LinuxRdt{},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := newAdjustment(m, nil, nil)
			if a != nil || err != nil {
				t.Errorf("the adjustment is %v, %v; want none", a, err)
			}
			if a.NeedsShim() != nil || a.Resources() != nil {
				t.Errorf("no adjustment needs %q and sets %v", a.NeedsShim(), a.Resources())
			}
		})
	}
}

// TestNeedsShim checks that each adjustment is either a resource of the CRI or needs the shim: none
// may be left out without the shim.
func TestNeedsShim(t *testing.T) {
	inCRI := []string{"CdiDevices", // CDIDevices is a field of its own
		"MemLimit", "MemSwapLimit", "CPUShares", "CPUQuota", "CPUPeriod", "CPUSetCPUs", "CPUSetMems", "HugepageLimits",
		"CgroupsUnified", "OomScoreAdj", "None", "MemReservation", "PidsLimit"}
	l := func(l *api.LinuxContainerAdjustment) *api.ContainerAdjustment {
		return &api.ContainerAdjustment{Linux: l}
	}
	r := func(r *api.LinuxResources) *api.ContainerAdjustment {
		return l(&api.LinuxContainerAdjustment{Resources: r})
	}
	rdt := func(r *api.LinuxRdt) *api.ContainerAdjustment { return l(&api.LinuxContainerAdjustment{Rdt: r}) }
	tests := map[string]*api.ContainerAdjustment{
		"Annotations":         {Annotations: map[string]string{"a": "b"}},
		"Mounts":              {Mounts: []*api.Mount{{Destination: "/x"}}},
		"OciHooks":            {Hooks: &api.Hooks{Poststop: []*api.Hook{{Path: "/h"}}}},
		"Env":                 {Env: []*api.KeyValue{{Key: "k"}}},
		"Args":                {Args: []string{"a"}},
		"Rlimits":             {Rlimits: []*api.POSIXRlimit{{Type: "RLIMIT_CORE"}}},
		"Devices":             l(&api.LinuxContainerAdjustment{Devices: []*api.LinuxDevice{{Path: "/d"}}}),
		"CgroupsPath":         l(&api.LinuxContainerAdjustment{CgroupsPath: "/x"}),
		"IoPriority":          l(&api.LinuxContainerAdjustment{IoPriority: &api.LinuxIOPriority{}}),
		"SeccompPolicy":       l(&api.LinuxContainerAdjustment{SeccompPolicy: &api.LinuxSeccomp{}}),
		"Namespace":           l(&api.LinuxContainerAdjustment{Namespaces: []*api.LinuxNamespace{{Type: "uts"}}}),
		"Sysctl":              l(&api.LinuxContainerAdjustment{Sysctl: map[string]string{"a": "b"}}),
		"LinuxNetDevices":     l(&api.LinuxContainerAdjustment{NetDevices: map[string]*api.LinuxNetDevice{"e": {}}}),
		"LinuxSched":          l(&api.LinuxContainerAdjustment{Scheduler: &api.LinuxScheduler{}}),
		"RdtClosID":           rdt(&api.LinuxRdt{ClosId: api.String("x")}),
		"RdtSchemata":         rdt(&api.LinuxRdt{Schemata: api.RepeatedString([]string{"x"})}),
		"RdtEnableMonitoring": rdt(&api.LinuxRdt{EnableMonitoring: api.Bool(true)}),
		"BlockioClass":        r(&api.LinuxResources{BlockioClass: api.String("fast")}),
		"RdtClass":            r(&api.LinuxResources{RdtClass: api.String("gold")}),
		"MemoryPolicy":        l(&api.LinuxContainerAdjustment{MemoryPolicy: &api.LinuxMemoryPolicy{}}),
		"MemKernelLimit":      r(&api.LinuxResources{Memory: &api.LinuxMemory{Kernel: api.Int64(1)}}),
		"MemUseHierarchy":     r(&api.LinuxResources{Memory: &api.LinuxMemory{UseHierarchy: api.Bool(true)}}),
		"MemDisableOomKiller": r(&api.LinuxResources{Memory: &api.LinuxMemory{DisableOomKiller: api.Bool(true)}}),
		"MemTCPLimit":         r(&api.LinuxResources{Memory: &api.LinuxMemory{KernelTcp: api.Int64(1)}}),
		"MemSwappiness":       r(&api.LinuxResources{Memory: &api.LinuxMemory{Swappiness: api.UInt64(1)}}),
		"CPURealtimeRuntime":  r(&api.LinuxResources{Cpu: &api.LinuxCPU{RealtimeRuntime: api.Int64(1)}}),
		"CPURealtimePeriod":   r(&api.LinuxResources{Cpu: &api.LinuxCPU{RealtimePeriod: api.UInt64(1)}}),
	}

	classes := map[string][]blockIORule{"fast": {}}
	for name := range api.Field_value {
		if tests[name] == nil && !slices.Contains(inCRI, name) {
			t.Errorf("the field %s of NRI is not tested", name)
		}
	}

	for name, m := range tests {
		t.Run(name, func(t *testing.T) {
			a, err := newAdjustment(m, nil, classes)
			if err != nil || len(a.NeedsShim()) != 1 {
				t.Errorf("it needs %q, %v; want one name", a.NeedsShim(), err)
			}
		})
	}
}

func TestResourcesRoundTrip(t *testing.T) {
	want := &runtimeapi.LinuxContainerResources{
		CpuShares:              2,
		CpuQuota:               -1,
		CpuPeriod:              3,
		CpusetCpus:             "0-1",
		CpusetMems:             "0",
		MemoryLimitInBytes:     1 << 30,
		MemorySwapLimitInBytes: 1 << 31,
		HugepageLimits:         []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4}},
		Unified:                map[string]string{"memory.high": "1"},
	}
	r := toResources(want)
	got, other := fromResources(r), propertiesOf(otherResources, r)
	if !proto.Equal(got, want) || len(other) > 0 {
		t.Errorf("got %v and %v, want %v", got, other, want)
	}
}

func TestUnsupportedUpdates(t *testing.T) {
	u := &api.ContainerUpdate{ContainerId: string(testID)}
	u.SetLinuxMemorySwappiness(5)
	got := fromUpdates([]*api.ContainerUpdate{nil, {ContainerId: "x"}, u})
	if len(got) != 1 || !errdefs.IsNotImplemented(got[0].Problem) ||
		!strings.Contains(got[0].Problem.Error(), "swappiness") {
		t.Errorf("updates: %v", got)
	}
}

func TestRDTClass(t *testing.T) {
	for class, isValid := range map[string]bool{
		"gold": true, "": true, "a.b": true, ".": false, "..": false, "a/b": false, "a\nb": false,
		strings.Repeat("x", 256): false,
	} {
		for name, l := range map[string]*api.LinuxContainerAdjustment{
			"class":      {Resources: &api.LinuxResources{RdtClass: api.String(class)}},
			"adjustment": {Rdt: &api.LinuxRdt{ClosId: api.String(class)}},
		} {
			if _, err := newAdjustment(&api.ContainerAdjustment{Linux: l}, nil, nil); (err == nil) != isValid {
				t.Errorf("%s %q: %v", name, class, err)
			}
		}
	}
}

// TestPluginResources: Docker has some resources that the CRI does not have.
func TestPluginResources(t *testing.T) {
	u := &api.ContainerUpdate{ContainerId: string(testID)}
	u.SetLinuxPidLimits(5)
	u.SetLinuxMemoryReservation(7 << 20)
	unlimited := &api.ContainerUpdate{ContainerId: string(testID)}
	unlimited.SetLinuxPidLimits(0)
	negative := &api.ContainerUpdate{ContainerId: string(testID)}
	negative.SetLinuxMemoryReservation(-1)

	got := fromUpdates([]*api.ContainerUpdate{u, unlimited, negative})
	want := model.PluginResources{PidsLimit: 5, MemoryReservation: 7 << 20}
	if got[0].Others != want || got[0].Problem != nil {
		t.Errorf("resources %+v, %v; want %+v", got[0].Others, got[0].Problem, want)
	}
	if got[1].Others.PidsLimit != -1 {
		t.Errorf("no limit is %d, want -1", got[1].Others.PidsLimit)
	}
	if !errdefs.IsInvalidArgument(got[2].Problem) {
		t.Errorf("a negative reservation: %v", got[2].Problem)
	}

	a, err := newAdjustment(&api.ContainerAdjustment{Linux: &api.LinuxContainerAdjustment{
		Resources: u.GetLinux().GetResources(),
	}}, nil, nil)
	if err != nil || a.PluginResources() != want || len(a.NeedsShim()) > 0 {
		t.Errorf("adjustment: %v, %+v, needs %q", err, a.PluginResources(), a.NeedsShim())
	}
}

// TestLimitsForPlugins shows plugins limits that the CRI does not have.
func TestLimitsForPlugins(t *testing.T) {
	c := testContainer()
	c.Process = &model.Process{Limits: model.PluginResources{PidsLimit: 5, MemoryReservation: 6}}
	r := toContainer(testPod(), c).GetLinux().GetResources()
	if r.GetPids().GetLimit() != 5 || r.GetMemory().GetReservation().GetValue() != 6 {
		t.Errorf("resources %v, want a process limit of 5 and a reservation of 6", r)
	}

	c.Process.Limits = model.PluginResources{}
	if r := toContainer(testPod(), c).GetLinux().GetResources(); r.GetPids() != nil || r.GetMemory() != nil {
		t.Errorf("resources %v, want none", r)
	}
}

// TestStore records an object, and reads it again as the next daemon.
func TestStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "nri")
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}

	plugged := model.Plugged{Required: true}
	container := model.Object{Container: &model.Container{ID: testID, Plugged: plugged}}
	if !s.IsUnfinished(container) {
		t.Error("a container without a file is finished")
	}

	m := &api.ContainerAdjustment{Args: []string{"x"}}
	if err := s.Complete(testID, &Adjustment{message: m}); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(dir, ".new-1"), nil, 0o600); err != nil { // of a killed daemon
		t.Fatal(err)
	}
	if s, err = OpenStore(dir); err != nil {
		t.Fatal(err)
	}

	a, err := s.Adjustment(testID)
	if err != nil || !proto.Equal(a.message, m) || s.IsUnfinished(container) || !slices.Equal(s.IDs(),
		[]model.ContainerID{testID}) {
		t.Errorf("after a restart: %v, %v, %q", a, err, s.IDs())
	}

	if err := errors.Join(s.Forget(testID), s.Forget(testID)); err != nil {
		t.Errorf("Forget: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("remaining files: %v, %v", entries, err)
	}
}

func TestUnfinished(t *testing.T) {
	s, err := OpenStore(filepath.Join(t.TempDir(), "nri"))
	if err != nil {
		t.Fatal(err)
	}

	plugged := model.Plugged{Required: true}
	for name, tt := range map[string]struct {
		object model.Object
		want   bool
	}{
		"created pod":           {model.Object{Sandbox: &model.Sandbox{Plugged: plugged, NeverStarted: true}}, true},
		"running pod":           {model.Object{Sandbox: &model.Sandbox{Plugged: plugged, Running: true}}, true},
		"pod after a reboot":    {model.Object{Sandbox: &model.Sandbox{Plugged: plugged}}, false},
		"pod without plugins":   {model.Object{Sandbox: &model.Sandbox{Running: true}}, false},
		"container":             {model.Object{Container: &model.Container{Plugged: plugged}}, true},
		"container, no plugins": {model.Object{Container: &model.Container{}}, false},
		"nothing":               {model.Object{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := s.IsUnfinished(tt.object); got != tt.want {
				t.Errorf("unfinished: %v, want %v", got, tt.want)
			}
		})
	}
}

// TestPluginsOfOthersAreRefused: plugins run as root.
func TestPluginsOfOthersAreRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "plugins")
	file := filepath.Join(dir, "10-x")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(file, nil, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := checkPlugins(dir); err != nil {
		t.Errorf("a plugin of root: %v", err)
	}

	if err := os.Chmod(file, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := checkPlugins(dir); err == nil {
		t.Error("a plugin that everybody can change was accepted")
	}

	if err := checkPlugins(filepath.Join(dir, "missing")); err != nil {
		t.Errorf("a missing directory: %v", err)
	}
}

func TestNamesOfPluginsAreBounded(t *testing.T) {
	n := &names{known: map[string]bool{}}
	for range maxPlugins {
		n.label(strings.Repeat("x", len(n.known)+1))
	}
	if got := n.label("new"); got != "other" {
		t.Errorf("label %q after %d names, want other", got, maxPlugins)
	}
	if got := n.label("x"); got != "x" {
		t.Errorf("label %q of a known name", got)
	}
}

func TestEvictionsOfTheContext(t *testing.T) {
	ctx, e := withEvictions(context.Background())
	e.add([]*api.ContainerEviction{{ContainerId: string(testID), Reason: "a\x00b"}})
	got := evictionsOf(ctx)
	if len(got) != 1 || got[0].ID != testID || strings.ContainsRune(got[0].Reason, 0) {
		t.Errorf("evictions: %q", got)
	}
	if got := evictionsOf(context.Background()); got != nil {
		t.Errorf("evictions without a collector: %q", got)
	}
}
