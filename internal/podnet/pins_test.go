package podnet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/model"
)

// newPins returns Pins with temporary directories for pins and records.
func newPins(t *testing.T) (pins *Pins, dir, records string) {
	t.Helper()
	base := t.TempDir()
	dir, records = filepath.Join(base, "netns"), filepath.Join(base, "records")
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }) // a possible mount of Prepare
	return NewPins(dir, records), dir, records
}

// TestPlantedPins replaces pins by links, files and mounts. None is followed, entered or unmounted.
func TestPlantedPins(t *testing.T) {
	pins, dir, records := newPins(t)
	if err := os.Mkdir(records, 0o755); err != nil { // with the mode of earlier versions
		t.Fatal(err)
	}

	other, _ := newPod(t, strings.Repeat("b", 64))
	otherPin, err := pins.Pin(model.ContainerID(other.ID), pidOf(t, other))
	if err != nil {
		t.Fatal(err)
	}

	if st, err := os.Stat(records); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the directory of records has %v, %v", st.Mode(), err)
	}

	mounted := filepath.Join(t.TempDir(), "mounted")
	if err := errors.Join(os.Mkdir(mounted, 0o755), syscall.Mount("tmpfs", mounted, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount(mounted, 0) //nolint:errcheck // the test's own namespace

	for _, file := range []string{filepath.Join(dir, pinName(sandboxID)), filepath.Join(records, sandboxID)} {
		for name, put := range map[string]func() error{
			"a link to another pin": func() error { return os.Symlink(otherPin, file) },
			"a link to a mount":     func() error { return os.Symlink(mounted, file) },
			"a file":                func() error { return os.WriteFile(file, []byte("x"), 0o644) },
			"a FIFO":                func() error { return unix.Mkfifo(file, 0o644) },
		} {
			plantPin(t, pins, other, mounted, file, name, put)
		}
	}

	if err := pins.Unpin(model.ContainerID(other.ID)); err != nil {
		t.Error(err)
	}
}

// plantPin is one case of TestPlantedPins.
func plantPin(t *testing.T, pins *Pins, other Pod, mounted, file, name string, put func() error) {
	t.Helper()
	if err := put(); err != nil {
		t.Fatal(err)
	}

	promptly(t, name, func() {
		if got := pins.Path(sandboxID); got != "" || pins.Joined(sandboxID, pidOf(t, other)) {
			t.Errorf("%s: accepted as a pin: %q", name, got)
		}
		if err := pins.move(sandboxID); err != nil || pins.Path(sandboxID) != "" {
			t.Errorf("%s: moved: %v", name, err)
		}

		if err := pins.Unpin(sandboxID); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	})

	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: remains", name)
	}

	var st unix.Statfs_t
	if err := unix.Statfs(mounted, &st); err != nil || st.Type != unix.TMPFS_MAGIC ||
		pins.Path(model.ContainerID(other.ID)) == "" {
		t.Fatalf("%s: another mount was removed", name)
	}

	if err := put(); err != nil {
		t.Fatal(err)
	}

	p, _ := newPod(t, sandboxID)
	if path, err := pins.Pin(sandboxID, pidOf(t, p)); err != nil || path != pins.Path(sandboxID) {
		t.Errorf("%s: pinned in its place: %q, %v", name, path, err)
	}

	if err := pins.Unpin(sandboxID); err != nil {
		t.Errorf("%s: %v", name, err)
	}
}

// TestPinsLeaveOtherFiles verifies that only files with our name patterns are touched, and in the
// shared directory only those of our sandboxes.
func TestPinsLeaveOtherFiles(t *testing.T) {
	pins, dir, records := newPins(t)
	if err := pins.Prepare(); err != nil {
		t.Fatal(err)
	}

	other, _ := newPod(t, strings.Repeat("b", 64))
	otherPin, err := pins.Pin(model.ContainerID(other.ID), pidOf(t, other))
	if err != nil {
		t.Fatal(err)
	}

	for _, name := range []string{"new-x", "new-0123456789abcdeF0", "new-", "x", sandboxID[:63]} {
		if err := os.WriteFile(filepath.Join(records, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	// of another runtime and of ip-netns(8)
	for _, name := range []string{"cni-0d2b4f6e-1a2b-3c4d-5e6f-0123456789ab", "blue"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	if err := errors.Join(pins.Prepare(), pins.Sweep()); err != nil || len(pins.List()) != 1 {
		t.Errorf("%v, %v", pins.List(), err)
	}

	if remaining, _ := os.ReadDir(records); len(remaining) != 6 {
		t.Errorf("files of others were changed: %v", remaining)
	}
	if remaining, _ := os.ReadDir(dir); len(remaining) != 3 {
		t.Errorf("files of others were changed: %v", remaining)
	}

	notCreated := filepath.Join(records, "new-0123456789abcdef")
	if err := os.WriteFile(notCreated, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	if path, err := pins.Keep(sandboxID, notCreated); err == nil || pins.Path(sandboxID) != "" {
		t.Errorf("a file was pinned as a namespace: %q, %v", path, err)
	}

	if len(pins.List()) != 1 {
		t.Error("its record remains")
	}

	for _, path := range []string{"/etc/passwd", filepath.Join(records, "x"), records + "/../new-0123456789abcdef",
		otherPin} {
		if err := pins.Drop(path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("drop %s: %v", path, err)
		}
		if _, err := pins.Keep(sandboxID, path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("keep %s: %v", path, err)
		}
	}

	if err := pins.Unpin(model.ContainerID(other.ID)); err != nil {
		t.Error(err)
	}
}

// TestPinsOfEarlierVersions moves a pin from the directory of records to the shared one, also after
// a crash in between. The path known to plugins leads to the same namespace.
func TestPinsOfEarlierVersions(t *testing.T) {
	for name, crash := range map[string]func(pins *Pins, ns *os.File) error{
		"as it was": func(*Pins, *os.File) error { return nil },
		"pinned twice": func(pins *Pins, ns *os.File) error {
			dir, err := openShared(pins.dir)
			if err != nil {
				return err
			}
			defer dir.Close()
			return mountIn(dir, ns, pinName(sandboxID))
		},
	} {
		t.Run(name, func(t *testing.T) {
			pins, dir, records := newPins(t)
			p, _ := newPod(t, sandboxID)
			ns, err := openNetNS(p.NetNS)
			if err != nil {
				t.Fatal(err)
			}
			defer ns.Close()

			if err := pins.Prepare(); err != nil {
				t.Fatal(err)
			}

			recordsDir, err := pins.openRecords(true)
			if err != nil {
				t.Fatal(err)
			}
			defer recordsDir.Close()

			if err := errors.Join(mountIn(recordsDir, ns, sandboxID), crash(pins, ns)); err != nil {
				t.Fatal(err)
			}

			old := filepath.Join(records, sandboxID)
			if pins.Path(sandboxID) == "" {
				t.Error("a pin of an earlier version is not found")
			}

			for range 2 {
				if err := pins.Prepare(); err != nil {
					t.Fatal(err)
				}

				if got := pins.Path(sandboxID); got != filepath.Join(dir, pinName(sandboxID)) ||
					isPinnedIn(records, sandboxID) {
					t.Errorf("path after the move: %q", got)
				}

				if !isNetNS(p.NetNS)(old) || !isNetNS(p.NetNS)(pins.Path(sandboxID)) || len(pins.List()) != 1 {
					t.Errorf("the old path does not lead to the namespace; list %v", pins.List())
				}
			}

			if err := pins.Unpin(sandboxID); err != nil {
				t.Error(err)
			}

			for _, d := range []string{dir, records} {
				if remaining, _ := os.ReadDir(d); len(remaining) > 0 {
					t.Errorf("files remain in %s: %v", d, remaining)
				}
			}
		})
	}
}

// TestPinsReachContainers verifies that an existing mount namespace sees new pins. It has slave
// mounts, like hostPath volumes with HostToContainer, and nothing was shared before.
func TestPinsReachContainers(t *testing.T) {
	pins, _, _ := newPins(t)
	if err := pins.Prepare(); err != nil {
		t.Fatal(err)
	}

	agent := exec.Command("unshare", "--mount", "--propagation", "slave", "sleep", "1000")
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	defer agent.Wait() //nolint:errcheck // killed
	defer agent.Process.Kill()

	original, _ := os.Readlink("/proc/self/ns/mnt")
	its := func() string { l, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", agent.Process.Pid)); return l }
	sleeps := func() bool {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", agent.Process.Pid))
		return its() != original && string(comm) == "sleep\n"
	}
	if !within(sleeps) {
		t.Fatal("no mount namespace")
	}

	p, _ := newPod(t, sandboxID)
	path, err := pins.Pin(sandboxID, pidOf(t, p))
	if err != nil {
		t.Fatal(err)
	}

	if seen := fmt.Sprintf("/proc/%d/root%s", agent.Process.Pid, path); !isNetNS(p.NetNS)(seen) {
		t.Errorf("%s is missing in the other mount namespace", path)
	}
	if err := pins.Unpin(sandboxID); err != nil {
		t.Error(err)
	}

	if seen := fmt.Sprintf("/proc/%d/root%s", agent.Process.Pid, path); isNetNS(p.NetNS)(seen) {
		t.Errorf("%s remains in the other mount namespace", path)
	}
}

// TestDamagedEntryKeepsAddresses damages a running pod's cache entry. The pod keeps its addresses,
// also after a restart. An incomplete pod has none.
func TestDamagedEntryKeepsAddresses(t *testing.T) {
	for name, damage := range map[string]func(entry string) error{
		"torn": func(entry string) error { return os.Truncate(entry, 100) },
		"a bad result": func(entry string) error {
			return os.WriteFile(entry, []byte(strings.Replace(readFile(entry), `"cniVersion":"0.4.0"`, `"cniVersion":7`,
				1)), 0o600)
		},
	} {
		for _, confirmed := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, complete: %v", name, confirmed), func(t *testing.T) {
				dir := t.TempDir()
				pins := NewPins(filepath.Join(dir, "netns"), filepath.Join(dir, "records"))
				k := newKubenet(t, dir, "10.93.0.0/24", "fd00:93::/64")
				p, _ := newPod(t, sandboxID)
				if _, err := pins.Pin(sandboxID, pidOf(t, p)); err != nil {
					t.Fatal(err)
				}

				want, err := k.Add(t.Context(), p)
				if err == nil && confirmed {
					err = k.Confirm(p.ID)
				}

				if err == nil {
					err = damage(filepath.Join(k.cfg.CacheDir, "results", "kubenet-"+p.ID+"-eth0"))
				}

				if err != nil {
					t.Fatal(err)
				}

				if !confirmed {
					want = nil
				}

				k.cfg.Pins = pins
				for range 2 {
					next, err := NewKubenet(k.cfg)
					if err != nil {
						t.Fatal(err)
					}

					if got := next.IPs(p.ID); fmt.Sprint(got) != fmt.Sprint(want) || len(next.Attached()) != 1 {
						t.Errorf("addresses %v, want %v; attached %v", got, want, next.Attached())
					}

					k = next
				}

				del(t, k, p)
				if err := pins.Unpin(sandboxID); err != nil {
					t.Error(err)
				}

				if remaining, _ := filepath.Glob("/var/lib/cni/networks/kubenet/*.*.*.*"); len(remaining) > 0 ||
					len(k.Attached()) > 0 {
					t.Errorf("addresses remain: %v, attached: %v", remaining, k.Attached())
				}
			})
		}
	}
}

func pidOf(t *testing.T, p Pod) (pid int) {
	t.Helper()
	if _, err := fmt.Sscanf(p.NetNS, "/proc/%d/ns/net", &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

// TestProcessOfAnother verifies that a reused PID does not yield a namespace.
func TestProcessOfAnother(t *testing.T) {
	pins, _, _ := newPins(t)
	p, _ := newPod(t, sandboxID)
	other := model.ContainerID(strings.Repeat("b", 64))
	for name, pid := range map[string]int{
		"another container's": pidOf(t, p),
		"our own":             os.Getpid(),
		"init":                1,
		"none":                0,
		"negative":            -1,
	} {
		t.Run(name, func(t *testing.T) {
			if path, err := pins.Pin(other, pid); !errdefs.IsNotFound(err) || pins.Path(other) != "" {
				t.Errorf("%s: %q, %v", name, path, err)
			}
		})
	}

	ids := func(all ...string) [][]string { return [][]string{all} }
	for name, c := range map[string]struct {
		groups, ours [][]string
		want         bool
	}{
		"a daemon in a container, nested engine": {ids("outer", sandboxID), ids("outer"), true},
		"a container of the outer engine":        {ids("outer", "x", sandboxID), ids("outer"), false},
		"the daemon's own container":             {ids("outer"), ids("outer"), false},
		"a daemon on the node":                   {ids("outer", sandboxID), nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := isContainer(c.groups, c.ours, sandboxID); got != c.want {
				t.Errorf("%s: %v", name, got)
			}
		})
	}
}

// TestManyDevices creates thousands of devices and addresses in a pod with CAP_NET_ADMIN. Time and
// memory stay bounded, and only eth0's addresses are the pod's.
func TestManyDevices(t *testing.T) {
	p, _ := newPod(t, sandboxID)
	var batch strings.Builder
	// The devices before eth0 have more addresses than the limit of a dump.
	for i := range 300 {
		fmt.Fprintf(&batch, "link add d%d type bridge\n", i)
		for j := range 60 {
			fmt.Fprintf(&batch, "addr add 10.%d.%d.%d/32 dev d%d\n", 64+i/250, i%250, j+1, i)
		}
	}

	batch.WriteString("link add eth0 type bridge\naddr add 10.1.2.3/24 dev eth0\naddr add fd00::3/64 dev eth0 " +
		"nodad\nlink add eth1 type bridge\naddr add 10.9.9.9/24 dev eth1\n")
	ip := func(batch string) {
		cmd := exec.Command("nsenter", "--net="+p.NetNS, "ip", "-batch", "-")
		cmd.Stdin = strings.NewReader(batch)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %.500s", err, out)
		}
	}

	ip(batch.String())
	got := Addresses(sandboxID, pidOf(t, p))
	if fmt.Sprint(got) != "[10.1.2.3 fd00::3]" {
		t.Errorf("%v", got)
	}

	batch.Reset()
	for i := range 2000 {
		fmt.Fprintf(&batch, "addr add 10.3.%d.%d/32 dev eth0\n", i/250, i%250+1)
	}

	ip(batch.String())
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	got = Addresses(sandboxID, pidOf(t, p))
	took := time.Since(began)
	runtime.ReadMemStats(&after)
	if len(got) != maxIPs || got[0].String() != "10.1.2.3" {
		t.Errorf("%d addresses, the first %v", len(got), got)
	}
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 256<<10 || took > time.Second {
		t.Errorf("%d bytes, %v", grown, took)
	}
}
