package task

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/shim/annotation"
	"cri-dockerd/internal/shim/bundle"
	"cri-dockerd/internal/shim/idmap"
)

// mapUsers provides root and mounts of a container in a user namespace, and the namespace: a new
// one for a pause, that of the pause for others. It returns nil without a user namespace. The
// caller must call done after runc has created the container, or has failed to.
func mapUsers(id string, b *bundle.Bundle) (users *bundle.Users, done func() error, err error) {
	if b.Want.UserNS == nil {
		return nil, func() error { return nil }, nil
	}

	if b.Spec.Root == nil || b.Spec.Linux == nil {
		return nil, nil, errors.New("the spec is incomplete")
	}

	mounts, err := b.MappedMounts()
	if err != nil {
		return nil, nil, err
	}

	ns, err := findUserNS(b)
	if err != nil {
		return nil, nil, fmt.Errorf("user namespace of the pod: %w", err)
	}

	stage, err := idmap.New(id, *b.Want.UserNS)
	if err != nil {
		return nil, nil, fmt.Errorf("user namespace: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stage.Close(), idmap.Clean(id))
		}
	}()

	users = &bundle.Users{NS: ns}
	if users.Root, err = stage.Root(b.Spec.Root.Path); err != nil {
		return nil, nil, err
	}

	if users.Sources, err = bindMounts(mounts, stage.Bind); err != nil {
		return nil, nil, err
	}

	return users, func() error { return errors.Join(idmap.Refresh(b.Spec.Root.Path), stage.Close()) }, nil
}

// sharedMemory is the mount of the pod's shared memory, a tmpfs of the engine.
const sharedMemory = "/dev/shm"

// bindMounts returns mapped mounts. Before Linux 6.3 the owners of a tmpfs cannot be mapped. Then
// the shared memory belongs to nobody inside, as with containerd. Everybody may write there.
func bindMounts(mounts map[string]string, bind func(string) (string, error)) (map[string]string, error) {
	mapped := map[string]string{}
	for target, source := range mounts {
		var err error
		mapped[target], err = bind(source)
		if target == sharedMemory && errors.Is(err, unix.EINVAL) {
			mapped[target], err = source, nil
		}
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", target, err)
		}
	}

	return mapped, nil
}

// findUserNS returns the path of the user namespace of the pause, "" for the pause itself. It must
// have the mapping of the annotation.
func findUserNS(b *bundle.Bundle) (string, error) {
	pid, err := b.PausePid()
	if err != nil || pid == 0 {
		return "", err
	}

	for file, want := range map[string]annotation.IDs{"uid_map": b.Want.UserNS.UIDs, "gid_map": b.Want.UserNS.GIDs} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err != nil {
			return "", err
		}

		fields := []string{"0", strconv.FormatUint(uint64(want.First), 10), strconv.FormatUint(uint64(want.Size), 10)}
		if got := strings.Fields(string(text)); strings.Join(got, " ") != strings.Join(fields, " ") {
			return "", fmt.Errorf("the pause has the %s %v, not %v", file, got, fields)
		}
	}

	return fmt.Sprintf("/proc/%d/ns/user", pid), nil
}
