package cgroup

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// markPrefix begins the names of our extended attributes. Those of the namespace "trusted" are for
// processes with CAP_SYS_ADMIN in the first user namespace (xattr(7)).
const markPrefix = "trusted.cri-dockerd."

// markPlaces are where a mark is kept: the first hierarchy in which the group has a place.
var markPlaces = []controller{unified, memory, pids, cpu, devices}

// SetMark notes something of the group, for as long as the group exists. Where the kernel keeps no
// extended attributes of groups, it does nothing.
func (g *Group) SetMark(name string) {
	_ = g.atMark(func(path string) error { return unix.Setxattr(path, markPrefix+name, []byte("1"), 0) })
}

// HasMark says whether SetMark was called for this group, by this process or an earlier one.
func (g *Group) HasMark(name string) bool {
	return g.atMark(func(path string) error { _, err := unix.Getxattr(path, markPrefix+name, nil); return err }) == nil
}

// atMark calls do with a path of the group's directory in the hierarchy where its marks are.
func (g *Group) atMark(do func(path string) error) error {
	for _, c := range markPlaces {
		root, path := g.place(c)
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
