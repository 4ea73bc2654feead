package podnet

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
)

// maxCgroupFile bounds /proc/PID/cgroup in bytes. Each of at most 16 hierarchies has a path of at
// most 4 KiB.
const maxCgroupFile = 64 << 10

// OpenProcess opens the network namespace of a container's main process. PIDs are reused, so it
// checks the process' control group before and after opening. It returns NotFound if the process
// has exited or belongs to another container.
func OpenProcess(id model.ContainerID, pid int) (*os.File, error) {
	ns, err := openProcess("/proc", id, pid)
	if err != nil {
		return nil, err
	}

	if err := checkNetNS(ns); err != nil {
		return nil, errors.Join(err, ns.Close())
	}

	return ns, nil
}

func openProcess(proc string, id model.ContainerID, pid int) (*os.File, error) {
	name := proc + "/" + strconv.Itoa(pid)
	errMismatch := fmt.Errorf("process %d is not container %s: %w", pid, id, errdefs.ErrNotFound)
	if id == "" || pid <= 0 {
		return nil, errMismatch
	}

	// The descriptor stays bound to this process. After its exit nothing below it can be opened,
	// even if the PID is reused (proc(5)).
	dir, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errMismatch
	}
	defer unix.Close(dir)

	ours := cgroupIDs(unix.AT_FDCWD, proc+"/self/cgroup") // of the container running the daemon, if any
	matches := func() bool {
		return isContainer(cgroupIDs(dir, "cgroup"), ours, id)
	}
	if !matches() {
		return nil, errMismatch
	}

	netns, err := openAt(dir, "ns/net", name)
	if err != nil {
		return nil, errMismatch
	}

	if !matches() { // the process may have been moved since
		netns.Close()
		return nil, errMismatch
	}

	return netns, nil
}

// cgroupIDs returns, for each hierarchy, the container IDs in the path of a process' control group,
// outermost first (cgroups(7), /proc/PID/cgroup: hierarchy:controllers:path).
func cgroupIDs(dir int, file string) (all [][]string) {
	f, err := openAt(dir, file, "")
	if err != nil {
		return nil
	}
	defer f.Close()

	b, err := io.ReadAll(io.LimitReader(f, maxCgroupFile))
	if err != nil {
		return nil
	}

	for line := range strings.Lines(string(b)) {
		fields := strings.SplitN(line, ":", 3)
		if len(fields) < 3 {
			continue
		}
		if ids := containerIDs(fields[2]); len(ids) > 0 {
			all = append(all, ids)
		}
	}

	return all
}

// containerIDs returns the container IDs in the path of a control group, such as /docker/ID and
// /system.slice/docker-ID.scope.
func containerIDs(path string) (all []string) {
	isNotHex := func(r rune) bool { return (r < '0' || r > '9') && (r < 'a' || r > 'f') }
	for word := range strings.FieldsFuncSeq(path, isNotHex) {
		if _, err := model.ParseContainerID(word); err == nil {
			all = append(all, word)
		}
	}
	return all
}

// isContainer reports whether control groups belong to a container. In every hierarchy with IDs,
// the outermost one must be the container's, since a container may create groups of any name below
// its own. IDs of the daemon's own groups, around the engine's, do not count.
func isContainer(groups, ours [][]string, id model.ContainerID) bool {
	found := false
	for _, ids := range groups {
		for len(ids) > 0 && slices.ContainsFunc(ours, func(own []string) bool { return slices.Contains(own, ids[0]) }) {
			ids = ids[1:]
		}

		if len(ids) == 0 {
			continue
		}
		if ids[0] != string(id) {
			return false
		}

		found = true
	}

	return found
}

func openAt(dir int, file, dirName string) (*os.File, error) {
	fd, err := unix.Openat(dir, file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), dirName+"/"+file), nil
}
