package task

import (
	"errors"
	"fmt"
	"maps"
	"testing"

	"golang.org/x/sys/unix"
)

// TestBindMounts maps mounts on a kernel that cannot map a tmpfs: only the shared memory remains as
// it is.
func TestBindMounts(t *testing.T) {
	failure := fmt.Errorf("map the owners: %w", unix.EINVAL)
	bind := func(source string) (string, error) {
		switch source {
		case "/tmpfs":
			return "", failure
		case "/forbidden":
			return "", unix.EPERM
		}
		return "/stage" + source, nil
	}

	for _, c := range []struct {
		mounts, want map[string]string
		err          error
	}{
		{map[string]string{"/v": "/disk"}, map[string]string{"/v": "/stage/disk"}, nil},
		{map[string]string{"/dev/shm": "/disk"}, map[string]string{"/dev/shm": "/stage/disk"}, nil},
		{map[string]string{"/dev/shm": "/tmpfs"}, map[string]string{"/dev/shm": "/tmpfs"}, nil},
		{map[string]string{"/v": "/tmpfs"}, nil, unix.EINVAL},
		{map[string]string{"/dev/shm": "/forbidden"}, nil, unix.EPERM},
	} {
		got, err := bindMounts(c.mounts, bind)
		if !maps.Equal(got, c.want) || !errors.Is(err, c.err) {
			t.Errorf("%v: got %v, %v; want %v, %v", c.mounts, got, err, c.want, c.err)
		}
	}
}
