package cgroup

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// markPrefix is the prefix of our extended attributes. The namespace "trusted" is reserved to
// processes with CAP_SYS_ADMIN in the initial user namespace (xattr(7)).
const markPrefix = "trusted.cri-dockerd."

// markControllers are the hierarchies for marks. A mark is stored in the first one that contains
// the group.
var markControllers = []controller{unified, memory, pids, cpu, devices}

// SetMark sets a mark on the group for as long as the group exists. It does nothing on kernels
// without extended attributes of groups.
func (g *Group) SetMark(name string) {
	_ = g.withMarkPath(func(path string) error { return unix.Setxattr(path, markPrefix+name, []byte("1"), 0) })
}

// HasMark reports whether this process or an earlier one called SetMark for this group.
func (g *Group) HasMark(name string) bool {
	return g.withMarkPath(func(path string) error {
		_, err := unix.Getxattr(path, markPrefix+name, nil)
		return err
	}) == nil
}

// withMarkPath calls do with a path of the group's directory in the hierarchy of its marks.
func (g *Group) withMarkPath(do func(path string) error) error {
	for _, c := range markControllers {
		root, path := g.locate(c)
		if root == "" {
			continue
		}

		dir, err := openBeneath(root, path, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer unix.Close(dir) //nolint:errcheck // a descriptor of a path only

		return do(fmt.Sprintf("/proc/self/fd/%d", dir))
	}

	return unix.ENOENT
}
