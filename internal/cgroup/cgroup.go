// Package cgroup finds the control groups of a container's process, reads what they have used, and
// reads and writes there what Docker's API cannot say: the OOM score of all its processes, huge
// page limits, and the files of cgroup v2 by name.
package cgroup

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

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

// controllers are their names, which are also those of the folders that their hierarchies are
// mounted on.
var controllers = [allControllers]string{"cpuacct", "cpu", "memory", "pids", "blkio", "hugetlb", "devices"}

// Group is the control group of one container, or that of its pod. Close releases what it holds
// open. There are many on a node, so it holds no more than it must.
type Group struct {
	kernel Kernel
	pid    int
	proc   processDir
	path   string                 // in its hierarchy
	v2     bool                   // cgroup v2 governs it
	hybrid bool                   // it is also in a hierarchy of v2 that has no controllers
	paths  [allControllers]string // in the hierarchies of cgroup v1
	moved  [allControllers]bool   // the main process has left the container's group there
	files  files
}

// maxMembership bounds /proc/<pid>/cgroup: a dozen lines, each with a path that a container can
// make as long as it likes.
const maxMembership = 256 << 10

// Of finds the control group of a container's main process (/proc/<pid>/cgroup, cgroups(7)). A
// component of the path must be the container's own as Docker names it, so that neither a PID that
// was reused nor a process that has moved to another container's group is taken for it: NotFound
// else. What lies below that component has been made in the container and is left off.
func (k Kernel) Of(pid int, containerID string) (*Group, error) {
	notFound := fmt.Errorf("process %d is not container %s: %w", pid, containerID, errdefs.ErrNotFound)
	if containerID == "" {
		return nil, notFound
	}

	proc, err := unix.Open(filepath.Join(k.Proc, strconv.Itoa(pid)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, notFound
	}

	g := &Group{kernel: k, pid: pid, proc: processDir{fd: int32(proc) + 1}}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)

	b, err := g.ReadProcess("cgroup", (*buf)[:0], maxMembership)
	if err != nil || !g.join(string(b), containerID) {
		g.Close()
		return nil, notFound
	}

	g.adoptMoved()

	return g, nil
}

// adoptMoved finds the container's groups in hierarchies of cgroup v1 in which its main process has
// moved out of them. Docker makes them at the same path in all hierarchies.
func (g *Group) adoptMoved() {
	for c, moved := range g.moved {
		if moved && g.paths[c] == "" && isThere(filepath.Join(g.kernel.Cgroup, controllers[c]), g.path) {
			g.paths[c] = g.path
		}
	}
}

// join reads the groups of a process as the kernel lists them, and says whether any is the
// container's.
func (g *Group) join(membership, containerID string) bool {
	v1 := false
	for line := range strings.Lines(membership) {
		parts := strings.SplitN(strings.TrimRight(line, "\n"), ":", 3) // hierarchy:controllers:path
		if len(parts) != 3 {
			continue
		}

		path, ok := ownPath(parts[2], containerID)
		if !ok {
			eachController(parts[1], func(c int) { g.moved[c] = true })
			continue
		}

		if g.path != path { // it is the same in all hierarchies
			g.path = path
		}

		if parts[0] == "0" && parts[1] == "" {
			g.v2 = true
			continue
		}

		v1 = true
		eachController(parts[1], func(c int) { g.paths[c] = g.path })
	}

	if v1 { // a hybrid machine's v2 hierarchy has no controllers
		g.v2, g.hybrid = false, g.v2
	}

	return g.path != ""
}

// eachController calls use with each controller in a list as the kernel has it: "cpu,cpuacct".
func eachController(list string, use func(c int)) {
	for name := range strings.SplitSeq(list, ",") {
		if c := slices.Index(controllers[:], name); c >= 0 {
			use(c)
		}
	}
}

// maxPath bounds the path of a group. That of a pod in a slice of systemd's has some 300 bytes.
const maxPath = 1024

// ownPath is the part of a process's path that leads to the container's own group: "<ID>" with the
// cgroupfs driver, "docker-<ID>.scope" with systemd's (Moby, daemon/oci_linux.go, WithCgroups). A
// path with ".." leads out of this cgroup namespace, and neither Docker nor the kubelet makes one
// that cannot be printed.
func ownPath(path, containerID string) (string, bool) {
	if !strings.HasPrefix(path, "/") || strings.Contains(path+"/", "/../") {
		return "", false
	}

	end := 0
	for component := range strings.SplitSeq(path[1:], "/") {
		end += 1 + len(component)
		name, scope := strings.CutPrefix(component, "docker-")
		if scope {
			name, scope = strings.CutSuffix(name, ".scope")
		}
		if component == containerID || scope && name == containerID {
			return strings.Clone(path[:end]), end <= maxPath && isPrintable(path[:end])
		}
	}

	return "", false
}

// isPrintable says whether a path can be a label of a metric.
func isPrintable(path string) bool {
	return utf8.ValidString(path) && strings.IndexFunc(path, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// place is the hierarchy of a controller, or of cgroup v2, and the group's path in it; "" if it has
// none there.
func (g *Group) place(c controller) (root, path string) {
	if c == unified {
		if g.v2 {
			return g.kernel.Cgroup, g.path
		}
		return "", ""
	}

	if g.paths[c] == "" {
		return "", ""
	}

	return filepath.Join(g.kernel.Cgroup, controllers[c]), g.paths[c]
}

// pressurePlace is its place in any hierarchy of cgroup v2.
func (g *Group) pressurePlace() (root, path string) {
	if g.hybrid {
		return filepath.Join(g.kernel.Cgroup, "unified"), g.path
	}
	return g.place(unified)
}

// V2 says whether the container is governed by cgroup v2.
func (g *Group) V2() bool { return g.v2 }
