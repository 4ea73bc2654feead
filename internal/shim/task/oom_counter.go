package task

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"golang.org/x/sys/unix"
)

// oomCounter counts the OOM kills in a control group.
type oomCounter struct {
	file *os.File // the kernel's counter; it can be read until the control group is removed
	// signals counts the out-of-memory states of cgroup v1, and its removal. It outlives the
	// control group. It is nil with cgroup v2, and if the kernel has none.
	signals *os.File
}

// removalDelay bounds the wait for the kernel's signal of a removal, which a worker of the kernel
// sends.
const removalDelay = 100 * time.Millisecond

// openCounter opens the counter of the control group of a process
// (Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst).
func openCounter(pid int) (oomCounter, error) {
	if cgroups.Mode() == cgroups.Unified {
		path, err := cgroup2.PidGroupPath(pid)
		if err != nil {
			return oomCounter{}, err
		}

		file, err := os.Open(filepath.Join("/sys/fs/cgroup", path, "memory.events"))

		return oomCounter{file: file}, err
	}

	groups, err := cgroup1.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return oomCounter{}, err
	}

	path, ok := groups["memory"]
	if !ok {
		return oomCounter{}, errors.New("the process is in no control group for memory")
	}

	return openV1(filepath.Join("/sys/fs/cgroup/memory", path))
}

// openV1 opens the counter of a control group of cgroup v1.
func openV1(dir string) (oomCounter, error) {
	file, err := os.Open(filepath.Join(dir, "memory.oom_control"))
	if err != nil {
		return oomCounter{}, err
	}

	signals, err := newSignals(dir, file)
	if err != nil { // a kernel without it; the counter alone is nearly always enough
		signals = nil
	}

	return oomCounter{file: file, signals: signals}, nil
}

// newSignals returns an eventfd for the out-of-memory states of a control group (memory.rst,
// section 10).
func newSignals(dir string, oomControl *os.File) (*os.File, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}

	signals := os.NewFile(uintptr(fd), "eventfd")
	request := fmt.Sprintf("%d %d", fd, oomControl.Fd())
	if err := os.WriteFile(filepath.Join(dir, "cgroup.event_control"), []byte(request), 0); err != nil {
		_ = signals.Close()
		return nil, err
	}

	return signals, nil
}

func (c oomCounter) close() {
	_ = c.file.Close() // opened for reading
	if c.signals != nil {
		_ = c.signals.Close()
	}
}

// hasKills reports whether the OOM killer has killed a process of the control group. systemd may
// have removed the control group of a container that has ended. With cgroup v1 the signals show
// then whether there was another reason for them than the removal; with cgroup v2 the kill is
// unknown.
func (c oomCounter) hasKills() bool {
	kills, err := countKills(c.file)
	if err == nil || c.signals == nil {
		return kills > 0
	}

	total := uint64(0)
	for end := time.Now().Add(removalDelay); total < 2 && time.Now().Before(end); {
		_ = c.signals.SetReadDeadline(end)
		var value [8]byte
		if _, err := io.ReadFull(c.signals, value[:]); err != nil {
			break
		}
		total += binary.NativeEndian.Uint64(value[:])
	}

	return total >= 2
}

// maxCounters bounds the size of the kernel's file.
const maxCounters = 4096

// countKills reads the number of OOM kills. The error is ENODEV if the control group was removed.
func countKills(file io.ReaderAt) (int, error) {
	text, err := io.ReadAll(io.NewSectionReader(file, 0, maxCounters))
	if err != nil {
		return 0, err
	}

	for line := range strings.Lines(string(text)) {
		if number, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.Atoi(strings.TrimSpace(number))
		}
	}

	return 0, nil
}
