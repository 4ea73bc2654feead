package cgroup

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// markPrefix is the prefix of our extended attributes. The namespace "trusted" is reserved to
// processes with CAP_SYS_ADMIN in the initial user namespace (xattr(7)).
const markPrefix = "trusted.cri-dockerd."

// MaxMark is the maximum size of a mark in bytes (XATTR_SIZE_MAX, xattr(7)).
const MaxMark = 64 << 10

// markControllers are the hierarchies for marks. A mark is stored in the first one that contains
// the group.
var markControllers = []controller{unified, memory, pids, cpu, devices}

// SetMark stores data with the group for as long as the group exists, at most MaxMark bytes. It
// fails on kernels without extended attributes of groups.
func (g *Group) SetMark(name string, data []byte) error {
	err := g.withMarkPath(func(path string) error { return unix.Setxattr(path, markPrefix+name, data, 0) })
	if err != nil {
		return fmt.Errorf("mark control group %s: %w", g.path, err)
	}
	return nil
}

// Mark returns the data that this process or an earlier one stored with the group. ok is false
// without any.
func (g *Group) Mark(name string) (data []byte, ok bool) {
	err := g.withMarkPath(func(path string) error {
		data = make([]byte, 512) // enough for most
		n, err := unix.Getxattr(path, markPrefix+name, data)
		if errors.Is(err, unix.ERANGE) {
			data = make([]byte, MaxMark)
			n, err = unix.Getxattr(path, markPrefix+name, data)
		}
		data = data[:max(n, 0)]
		return err
	})
	if err != nil {
		return nil, false
	}

	return data, true
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
