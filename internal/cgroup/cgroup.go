// Package cgroup finds the control groups of a container's process and reads their resource usage.
// It also covers settings missing from Docker's API: the OOM score of all processes, huge page
// limits, and the files of cgroup v2 by name.
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

// Kernel locates the kernel's file systems of processes and control groups. Tests use their own
// directories.
type Kernel struct {
	Proc   string // proc(5)
	Cgroup string // mount point of cgroup v2, or the directory of all v1 hierarchies
	Pages  string // lists the sizes of huge pages
	Log    string // the kernel's log (dev-kmsg), "" for none
}

// Host returns this machine's kernel.
func Host() Kernel {
	return Kernel{Proc: "/proc", Cgroup: "/sys/fs/cgroup", Pages: "/sys/kernel/mm/hugepages", Log: "/dev/kmsg"}
}

// controller is a controller of cgroup v1, as far as used here.
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
	unified // cgroup v2, with one hierarchy for all
)

// controllers are the controllers' names. The mount points of their hierarchies have the same
// names.
var controllers = [allControllers]string{"cpuacct", "cpu", "memory", "pids", "blkio", "hugetlb", "devices"}

// Group is the control group of one container, or of its pod. Close releases its descriptors. A
// node has many groups, so each holds as little as possible.
type Group struct {
	kernel Kernel
	pid    int
	proc   processDir
	path   string                 // in its hierarchy
	v2     bool                   // managed by cgroup v2
	hybrid bool                   // also in a hierarchy of v2 without controllers
	paths  [allControllers]string // in the hierarchies of cgroup v1
	moved  [allControllers]bool   // the main process has moved out of the container's group there
	files  files
}

// maxMembership limits /proc/<pid>/cgroup, in bytes: a dozen lines, each with a path of arbitrary
// length under the container's control.
const maxMembership = 256 << 10

// FindGroup finds the control group of a container's main process (/proc/<pid>/cgroup, cgroups(7)).
// A component of the path must be the container's own, in Docker's naming. This rejects a reused
// PID, and a process that moved to another container's group, with NotFound. The path ends at that
// component, because the container created everything below it.
func (k Kernel) FindGroup(pid int, containerID string) (*Group, error) {
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
	if err != nil || !g.parseMembership(string(b), containerID) {
		g.Close()
		return nil, notFound
	}

	g.adoptMoved()

	return g, nil
}

// adoptMoved finds the container's groups in cgroup v1 hierarchies after its main process has moved
// out of them. Docker creates them at the same path in all hierarchies.
func (g *Group) adoptMoved() {
	for c, moved := range g.moved {
		if moved && g.paths[c] == "" && groupExists(filepath.Join(g.kernel.Cgroup, controllers[c]), g.path) {
			g.paths[c] = g.path
		}
	}
}

// parseMembership parses the kernel's list of a process's groups, and reports whether any is the
// container's.
func (g *Group) parseMembership(membership, containerID string) bool {
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

// eachController calls use with each controller in a list in the kernel's format: "cpu,cpuacct".
func eachController(list string, use func(c int)) {
	for name := range strings.SplitSeq(list, ",") {
		if c := slices.Index(controllers[:], name); c >= 0 {
			use(c)
		}
	}
}

// maxPath limits the path of a group, in bytes. A pod's path in a systemd slice has some 300 bytes.
const maxPath = 1024

// ownPath returns the part of a process's path up to the container's own group: "<ID>" with the
// cgroupfs driver, "docker-<ID>.scope" with systemd's (Moby, daemon/oci_linux.go, WithCgroups). It
// rejects a path with "..", because it leads out of this cgroup namespace, and an unprintable path,
// because neither Docker nor the kubelet creates one.
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

// isPrintable reports whether a path is valid as a label of a metric.
func isPrintable(path string) bool {
	return utf8.ValidString(path) && strings.IndexFunc(path, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// locate returns the hierarchy of a controller, or of cgroup v2, and the group's path in it. It
// returns "" if the group is not part of that hierarchy.
func (g *Group) locate(c controller) (root, path string) {
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

// locatePressure returns the group's location in any cgroup v2 hierarchy.
func (g *Group) locatePressure() (root, path string) {
	if g.hybrid {
		return filepath.Join(g.kernel.Cgroup, "unified"), g.path
	}
	return g.locate(unified)
}

// V2 reports whether the container is managed by cgroup v2.
func (g *Group) V2() bool { return g.v2 }

// Scope returns the name of the group's systemd unit, or "" if systemd does not write the group's
// files: with Docker's cgroupfs driver, and on cgroup v1.
func (g *Group) Scope() string {
	if name := filepath.Base(g.path); g.v2 && strings.HasSuffix(name, ".scope") {
		return name
	}
	return ""
}
