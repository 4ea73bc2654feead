package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// group is the control group of a pause.
type group interface {
	// enter moves the calling thread, so that its children start in the group. cgroup v2 moves
	// processes only: there it does nothing.
	enter() error
	add(ctx context.Context, pid int) error
	processes() ([]int, error)
	update(ctx context.Context, r *specs.LinuxResources) error
	freeze() error
	thaw() error
	stats() (any, error) // in containerd's form
	remove(ctx context.Context) error
}

// cgroupRoot is where cgroup v2 is mounted (cgroups(7)).
const cgroupRoot = "/sys/fs/cgroup"

// newGroup creates a control group with limits. With Docker's systemd driver it is that of a scope.
func newGroup(path string, r *specs.LinuxResources) (group, error) {
	if r == nil {
		r = &specs.LinuxResources{}
	}

	g, err := createGroup(path, r)
	if err == nil && strings.HasSuffix(path, scopeSuffix) {
		g = scope{g, path, r}
	}

	return g, err
}

func createGroup(path string, r *specs.LinuxResources) (group, error) {
	if cgroups.Mode() == cgroups.Unified {
		m, err := cgroup2.NewManager(cgroupRoot, path, cgroup2.ToResources(r))
		if err != nil {
			return nil, fmt.Errorf("create control group %s: %w", path, err)
		}
		return groupV2{m}, nil
	}

	c, err := cgroup1.New(cgroup1.StaticPath(path), r)
	if err != nil {
		return nil, fmt.Errorf("create control group %s: %w", path, err)
	}

	return groupV1{c}, nil
}

// findGroup returns the control group with this path. The error is os.ErrNotExist if there is none.
func findGroup(path string) (group, error) {
	g, err := loadGroup(path)
	if err == nil && strings.HasSuffix(path, scopeSuffix) {
		g = scope{g, path, nil}
	}
	return g, err
}

func loadGroup(path string) (group, error) {
	if cgroups.Mode() == cgroups.Unified {
		m, err := cgroup2.Load(path)
		if err != nil {
			return nil, err
		}
		return groupV2{m}, nil
	}

	c, err := cgroup1.Load(cgroup1.StaticPath(path))
	if errors.Is(err, cgroup1.ErrCgroupDeleted) {
		return nil, os.ErrNotExist
	}
	if err != nil {
		return nil, err
	}

	return groupV1{c}, nil
}

// removeGroup removes a control group by its path. It succeeds if the group does not exist.
func removeGroup(ctx context.Context, path string) error {
	g, err := findGroup(path)
	if err != nil {
		return ignoreMissing(err)
	}
	return g.remove(ctx)
}

// CanLimitHugepages reports whether the kernel limits huge pages of a size, such as "2MB". With
// cgroup v1 the root of the hierarchy has its files, with v2 it lists the controller.
func CanLimitHugepages(size string) bool {
	if cgroups.Mode() != cgroups.Unified {
		_, err := os.Stat(cgroupRoot + "/hugetlb/hugetlb." + size + ".usage_in_bytes")
		return err == nil
	}

	controllers, err := os.ReadFile(cgroupRoot + "/cgroup.controllers")

	return err == nil && slices.Contains(strings.Fields(string(controllers)), "hugetlb") && hasHugepages(size)
}

// hasHugepages reports whether the kernel has huge pages of a size (sysfs, mm/hugepages).
func hasHugepages(size string) bool {
	number, unit := size[:len(size)-2], size[len(size)-2:]
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return false
	}

	kib := n * map[string]uint64{"KB": 1, "MB": 1 << 10, "GB": 1 << 20}[unit]
	_, err = os.Stat(fmt.Sprintf("/sys/kernel/mm/hugepages/hugepages-%dkB", kib))

	return err == nil
}

type groupV1 struct{ c cgroup1.Cgroup }

func (g groupV1) add(_ context.Context, pid int) error                    { return g.c.AddProc(uint64(pid)) }
func (g groupV1) update(_ context.Context, r *specs.LinuxResources) error { return g.c.Update(r) }
func (g groupV1) freeze() error                                           { return g.c.Freeze() }
func (g groupV1) thaw() error                                             { return g.c.Thaw() }
func (g groupV1) stats() (any, error)                                     { return g.c.Stat(cgroup1.IgnoreNotExist) }
func (g groupV1) remove(context.Context) error                            { return ignoreMissing(g.c.Delete()) }

func (g groupV1) enter() error { return g.c.AddTask(cgroup1.Process{Pid: unix.Gettid()}) }

// processes returns the processes of all hierarchies: a start may have reached only some of them.
func (g groupV1) processes() ([]int, error) {
	var pids []int
	for _, s := range g.c.Subsystems() {
		list, err := g.c.Processes(s.Name(), false)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, p := range list {
			pids = append(pids, p.Pid)
		}
	}

	return pids, nil
}

type groupV2 struct{ m *cgroup2.Manager }

func (g groupV2) processes() ([]int, error) {
	list, err := g.m.Procs(false)
	if err != nil {
		return nil, ignoreMissing(err)
	}

	pids := make([]int, len(list))
	for i, p := range list {
		pids[i] = int(p)
	}

	return pids, nil
}

func (g groupV2) enter() error                         { return nil }
func (g groupV2) add(_ context.Context, pid int) error { return g.m.AddProc(uint64(pid)) }
func (g groupV2) update(_ context.Context, r *specs.LinuxResources) error {
	return g.m.Update(cgroup2.ToResources(r))
}
func (g groupV2) freeze() error                { return g.m.Freeze() }
func (g groupV2) thaw() error                  { return g.m.Thaw() }
func (g groupV2) stats() (any, error)          { return g.m.Stat() }
func (g groupV2) remove(context.Context) error { return ignoreMissing(g.m.Delete()) }

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, cgroup1.ErrCgroupDeleted) {
		return nil
	}
	return err
}
