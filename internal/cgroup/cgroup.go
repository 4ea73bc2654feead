// Package cgroup finds the control groups of a container's process, reads what they have used, and reads and writes there what Docker's API
// cannot say: the OOM score of all its processes, huge page limits, and the files of cgroup v2 by name.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Kernel says where the kernel shows processes and control groups; tests give folders of their own.
type Kernel struct {
	Proc   string // proc(5)
	Cgroup string // where cgroup v2, or the folder of all v1 hierarchies, is mounted
	Pages  string // where the sizes of huge pages are listed
}

// Host is this machine's kernel.
func Host() Kernel {
	return Kernel{Proc: "/proc", Cgroup: "/sys/fs/cgroup", Pages: "/sys/kernel/mm/hugepages"}
}

// controller is one of cgroup v1 that is of interest here.
type controller uint8

const (
	cpuacct controller = iota
	cpu
	memory
	pids
	blkio
	hugetlb
	devices
	allControllers
	unified // cgroup v2, which has no hierarchy for each
)

// controllers are their names, which are also those of the folders that their hierarchies are mounted on.
var controllers = [allControllers]string{"cpuacct", "cpu", "memory", "pids", "blkio", "hugetlb", "devices"}

// Group is the control group of one container, or that of its pod. Reading its figures keeps files open until Close; the rest does not. There are
// many on a node, so it holds no more than it must.
type Group struct {
	kernel Kernel
	pid    int
	path   string                 // in its hierarchy
	v2     bool                   // cgroup v2 governs it
	hybrid bool                   // it is also in a hierarchy of v2 that has no controllers
	paths  [allControllers]string // in the hierarchies of cgroup v1
	files  files
}

// Of finds the control group of a container's main process (/proc/<pid>/cgroup, cgroups(7)). The container's ID must stand in the path, so
// that neither a PID that was given away nor the process of an engine on another machine is taken for it: NotFound else.
func (k Kernel) Of(pid int, containerID string) (*Group, error) {
	b, err := os.ReadFile(k.process(pid, "cgroup"))
	if err != nil || containerID == "" || !strings.Contains(string(b), containerID) {
		return nil, fmt.Errorf("process %d is not container %s: %w", pid, containerID, errdefs.ErrNotFound)
	}
	g := &Group{kernel: k, pid: pid}
	v1 := false
	for line := range strings.Lines(string(b)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3) // hierarchy:controllers:path
		if len(parts) != 3 || !strings.Contains(parts[2], containerID) {
			continue
		}
		if g.path != parts[2] { // it is the same in all hierarchies
			g.path = strings.Clone(parts[2])
		}
		if parts[0] == "0" && parts[1] == "" {
			g.v2 = true
			continue
		}
		v1 = true
		for name := range strings.SplitSeq(parts[1], ",") {
			if c := slices.Index(controllers[:], name); c >= 0 {
				g.paths[c] = g.path
			}
		}
	}
	if v1 { // a hybrid machine's v2 hierarchy has no controllers
		g.v2, g.hybrid = false, g.v2
	}
	return g, nil
}

// dir is the group's folder in the hierarchy of a controller, or of cgroup v2; "" if it has none there.
func (g *Group) dir(c controller) string {
	if c == unified {
		if g.v2 {
			return filepath.Join(g.kernel.Cgroup, g.path)
		}
		return ""
	}
	if g.paths[c] == "" {
		return ""
	}
	return filepath.Join(g.kernel.Cgroup, controllers[c], g.paths[c])
}

// pressureDir is its folder in any hierarchy of cgroup v2, "" if it is in none.
func (g *Group) pressureDir() string {
	if g.hybrid {
		return filepath.Join(g.kernel.Cgroup, "unified", g.path)
	}
	return g.dir(unified)
}

func (k Kernel) process(pid int, file string) string {
	return filepath.Join(k.Proc, strconv.Itoa(pid), file)
}

// V2 says whether the container is governed by cgroup v2.
func (g *Group) V2() bool { return g.v2 }

// OOMScoreAdj is the main process's score (proc_pid_oom_score_adj(5)).
func (g *Group) OOMScoreAdj() (int, error) {
	b, err := os.ReadFile(g.kernel.process(g.pid, "oom_score_adj"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// forkRounds is how often processes that were forked meanwhile are looked for.
const forkRounds = 5

// SetOOMScoreAdj gives every process of the container a score. It is inherited, so processes to come have it too. A permission error means
// that the score is below what this process may give.
func (g *Group) SetOOMScoreAdj(score int) error {
	done := map[int]bool{}
	for range forkRounds {
		pids, err := g.processes()
		if errdefs.IsNotFound(err) {
			return nil // it has ended
		} else if err != nil {
			return err
		}
		news := slices.DeleteFunc(pids, func(p int) bool { return done[p] })
		if len(news) == 0 {
			break
		}
		for _, p := range news {
			err := write(g.kernel.process(p, "oom_score_adj"), strconv.Itoa(score))
			if err != nil && !gone(err) {
				return fmt.Errorf("oom_score_adj of process %d: %w", p, err)
			}
			done[p] = true
		}
	}
	return nil
}

// Processes is how many there are. NotFound if the group is gone.
func (g *Group) Processes() (uint64, error) {
	pids, err := g.PIDs()
	return uint64(len(pids)), err
}

// PIDs are the processes of the group and of those below it. NotFound if the group is gone.
func (g *Group) PIDs() ([]int, error) {
	if g.alone() {
		return []int{g.pid}, nil
	}
	return g.processes()
}

// alone says that a container's main process, without which it ends, has no other and no threads: most have none, and to look for them costs ten
// times as much.
func (g *Group) alone() bool {
	defer g.begin()()
	f := pidsCurrent1
	if g.V2() {
		f = pidsCurrent
	}
	n, err := g.number(f)
	return err == nil && n == 1 && g.pid > 0
}

// processes are the container's, those in groups that it has made itself included.
func (g *Group) processes() ([]int, error) {
	root := g.dir(unified)
	for _, c := range []controller{memory, pids, cpu, devices} {
		if root == "" {
			root = g.dir(c)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return nil, fmt.Errorf("control group %s: %w: %w", g.path, err, errdefs.ErrNotFound)
	}
	if st.Nlink == 2 { // its own name and that in its parent: there are no groups below it
		return members(nil, root)
	}
	var pids []int
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil && gone(err) {
			return nil
		}
		if err != nil || !d.IsDir() {
			return err
		}
		pids, err = members(pids, path)
		return err
	})
	return pids, err
}

// members adds the processes of one group. The file is opened anew each time, since cgroup v1 shows the same list for a second to one who reads on.
func members(pids []int, dir string) ([]int, error) {
	var buf [512]byte
	b, err := Read(filepath.Join(dir, "cgroup.procs"), buf[:0])
	if err != nil && !gone(err) {
		return pids, err
	}
	for line := range strings.Lines(string(b)) {
		if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// gone says that a process or group ended while it was looked at.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODEV)
}
