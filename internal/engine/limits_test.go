package engine

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/systemd"
)

// fakeUnits is systemd for one scope. Like systemd, it writes all memory files after a change:
// those with a property have its value, the others the default.
type fakeUnits struct {
	dir    string // of the control group
	values map[string]string
	reject string // name of a rejected property
	err    error  // of every call
	calls  int
	due    bool // changes are applied by Sync
}

var memoryDefaults = map[string]string{
	"memory.high":      "max",
	"memory.swap.max":  "max",
	"memory.oom.group": "0",
}

func (u *fakeUnits) SetProperties(_ context.Context, _ string, properties []systemd.Property) error {
	u.calls++
	if u.err != nil {
		return u.err
	}
	for _, p := range properties {
		if p.Name == u.reject {
			return fmt.Errorf("unknown property: %w", errdefs.ErrInvalidArgument)
		}
	}

	for _, p := range properties {
		switch p.Name {
		case "MemoryHigh":
			u.values["memory.high"] = fmt.Sprint(p.Value)
		case "MemorySwapMax":
			u.values["memory.swap.max"] = fmt.Sprint(p.Value)
		}
	}
	u.due = true

	return nil
}

func (u *fakeUnits) Sync(context.Context) error {
	if u.err == nil && u.due {
		u.apply()
	}
	return u.err
}

func (u *fakeUnits) Reloaded() <-chan struct{} { return nil }

// apply writes the files, as at a daemon-reload.
func (u *fakeUnits) apply() {
	u.due = false
	for file, value := range memoryDefaults {
		if v, ok := u.values[file]; ok {
			value = v
		}
		if err := os.WriteFile(filepath.Join(u.dir, file), []byte(value+"\n"), 0o600); err != nil {
			panic(err)
		}
	}
}

// scope creates the control group of a container with Docker's systemd driver.
func scope(t *testing.T) (*Engine, *fakeUnits, *model.Container) {
	t.Helper()
	id := model.ContainerID(strings.Repeat("a", 64))
	dir := t.TempDir()
	path := "kubepods.slice/docker-" + string(id) + ".scope"
	u := &fakeUnits{dir: filepath.Join(dir, "cgroup", path), values: map[string]string{}}
	for name, content := range map[string]string{
		"proc/7/cgroup":        "0::/" + path + "\n",
		"proc/7/oom_score_adj": "0\n",
	} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	if err := os.MkdirAll(u.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	u.apply()

	e := &Engine{
		cfg:    Config{Units: u, Log: slog.New(slog.DiscardHandler)},
		kernel: cgroup.Kernel{Proc: filepath.Join(dir, "proc"), Cgroup: filepath.Join(dir, "cgroup")},
	}
	c := &model.Container{
		ID:  id,
		Pid: 7,
		Resources: &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{
			MemoryLimitInBytes:     1 << 20,
			MemorySwapLimitInBytes: 1 << 20,
		}},
		Kernel: model.KernelLimits{Unified: map[model.UnifiedKey]string{
			"memory.high":      "4096",
			"memory.oom.group": "1",
		}},
	}

	return e, u, c
}

// checkFiles compares the files memory.high, memory.oom.group and memory.swap.max.
func (u *fakeUnits) checkFiles(t *testing.T, when, want string) {
	t.Helper()
	var got []string
	for _, file := range []string{"memory.high", "memory.oom.group", "memory.swap.max"} {
		b, err := os.ReadFile(filepath.Join(u.dir, file))
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, strings.TrimSpace(string(b)))
	}

	if s := strings.Join(got, " "); s != want {
		t.Errorf("%s: %s, want %s", when, s, want)
	}
}

func succeed(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// TestLimitsSurviveSystemd: limits with a property survive by themselves, the others are restored.
// An update is remembered by the control group alone.
func TestLimitsSurviveSystemd(t *testing.T) {
	e, u, c := scope(t)
	succeed(t, "start", e.LimitStarted(t.Context(), c))
	u.checkFiles(t, "after the start", "4096 1 0")

	u.apply()
	u.checkFiles(t, "after a reload", "4096 0 0")
	succeed(t, "keep", e.KeepLimits(t.Context(), c))
	u.checkFiles(t, "restored", "4096 1 0")

	succeed(t, "update", e.Limit(t.Context(), c, model.KernelLimits{
		Unified: map[model.UnifiedKey]string{"memory.high": "8192"},
	}))
	u.checkFiles(t, "after an update", "8192 1 0")

	delete(u.values, "memory.swap.max") // by the OCI runtime
	u.apply()
	u.checkFiles(t, "after an update by the engine", "8192 0 max")
	succeed(t, "start again", e.LimitStarted(t.Context(), c))
	u.checkFiles(t, "LimitStarted has nothing to do", "8192 0 max")
	succeed(t, "keep", e.KeepLimits(t.Context(), c))
	u.apply()
	u.checkFiles(t, "the property was set again", "8192 0 0")
	succeed(t, "update without changes", e.Limit(t.Context(), c, model.KernelLimits{}))

	calls := u.calls
	succeed(t, "keep", e.KeepLimits(t.Context(), c))
	u.checkFiles(t, "restored again", "8192 1 0")
	if u.calls != calls {
		t.Error("properties were set although systemd has them")
	}

	r := e.Measure(c).Resources.GetLinux()
	if got := fmt.Sprint(r.GetUnified(), r.GetMemoryLimitInBytes()); got !=
		"map[memory.high:8192 memory.oom.group:1] 1048576" {
		t.Errorf("measured %s", got)
	}
}

// TestSystemdDoesNotAnswer: the limits are set at once, and kept as soon as systemd answers, even
// by another daemon.
func TestSystemdDoesNotAnswer(t *testing.T) {
	e, u, c := scope(t)
	u.err = fmt.Errorf("no answer: %w", errdefs.ErrUnavailable)
	if err := e.LimitStarted(t.Context(), c); !errdefs.IsUnavailable(err) {
		t.Errorf("start: error %v, want Unavailable", err)
	}
	if err := e.KeepLimits(t.Context(), c); !errdefs.IsUnavailable(err) {
		t.Errorf("keep: error %v, want Unavailable", err)
	}

	u.checkFiles(t, "without systemd", "4096 1 0")

	u.err = nil
	succeed(t, "keep", e.KeepLimits(t.Context(), c))
	u.checkFiles(t, "kept", "4096 1 0")
	u.apply()
	u.checkFiles(t, "after a reload", "4096 0 0")
}

// TestRejectedProperty: an older systemd rejects one property. It keeps the others.
func TestRejectedProperty(t *testing.T) {
	e, u, c := scope(t)
	u.reject = "MemorySwapMax"
	succeed(t, "start", e.LimitStarted(t.Context(), c))
	u.checkFiles(t, "after the start", "4096 1 0")
	u.apply()
	u.checkFiles(t, "after a reload", "4096 0 max")
	succeed(t, "keep", e.KeepLimits(t.Context(), c))
	u.checkFiles(t, "restored", "4096 1 0")
}

// TestForeignMark: the mark of an older release, and one that no release writes, stand for the
// limits of the start without properties.
func TestForeignMark(t *testing.T) {
	for _, mark := range []string{"1", `{"updates":{"unified":{"../memory.high":"1"}}}`} {
		t.Run(mark, func(t *testing.T) {
			e, u, c := scope(t)
			l := e.limits(c)
			defer l.Close()
			succeed(t, "mark", l.SetMark(limitsMark, []byte(mark)))
			succeed(t, "start", e.LimitStarted(t.Context(), c))
			u.checkFiles(t, "LimitStarted has nothing to do", "max 0 max")
			succeed(t, "keep", e.KeepLimits(t.Context(), c))
			u.apply()
			u.checkFiles(t, "after a reload", "4096 0 0")
		})
	}
}

// TestTooManyUpdates rejects an update that the control group cannot remember.
func TestTooManyUpdates(t *testing.T) {
	e, _, c := scope(t)
	err := e.Limit(t.Context(), c, model.KernelLimits{Unified: map[model.UnifiedKey]string{
		"memory.high": strings.Repeat("\n", cgroup.MaxMark),
	}})
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("error %v, want InvalidArgument", err)
	}
}

// TestEndedContainer: the limits of an ended container are no error.
func TestEndedContainer(t *testing.T) {
	e, u, c := scope(t)
	u.err = fmt.Errorf("no such unit: %w", errdefs.ErrNotFound)
	succeed(t, "start", e.LimitStarted(t.Context(), c))
	c.Pid = 8
	succeed(t, "start", e.LimitStarted(t.Context(), c))
	succeed(t, "update", e.Limit(t.Context(), c, c.Kernel))
	succeed(t, "keep", e.KeepLimits(t.Context(), c))
	if got := e.Measure(c); got != c {
		t.Errorf("measured %v", got)
	}
}
