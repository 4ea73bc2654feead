package stats

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/cgroup"
)

const (
	id  = "c0ffee"
	uid = "0a1b-2c3d"
)

// machine is a test's own kernel with cgroup v2.
type machine struct {
	t   *testing.T
	dir string
}

func newMachine(t *testing.T) (machine, *Reader) {
	m := machine{t, t.TempDir()}
	m.write("proc/7/cgroup", "0::/kubepods/pod"+uid+"/"+id+"\n")
	for _, group := range []string{"kubepods/pod" + uid, "kubepods/pod" + uid + "/" + id} {
		m.write("cgroup/"+group+"/memory.current", "100\n")
		m.write("cgroup/"+group+"/memory.stat", "anon 50\ninactive_file 10\n")
		m.write("cgroup/"+group+"/cgroup.procs", "7\n")
	}

	m.setCPU(id, 0)

	return m, New(cgroup.Kernel{Proc: filepath.Join(m.dir, "proc"), Cgroup: filepath.Join(m.dir, "cgroup")})
}

func (m machine) write(name, content string) {
	m.t.Helper()
	file := filepath.Join(m.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(content), 0o644)); err !=
		nil {
		m.t.Fatal(err)
	}
}

// setCPU sets the CPU usage of the container and its pod.
func (m machine) setCPU(container string, cpu time.Duration) {
	content := "usage_usec " + strconv.FormatInt(cpu.Microseconds(), 10) + "\n"
	m.write("cgroup/kubepods/pod"+uid+"/"+container+"/cpu.stat", content)
	m.write("cgroup/kubepods/pod"+uid+"/cpu.stat", content)
}

func TestCores(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, r := newMachine(t)
		read := func() *uint64 {
			t.Helper()
			u, err := r.Container(id, 7)
			if err != nil {
				t.Fatal(err)
			}
			return u.NanoCores
		}
		if c := read(); c != nil {
			t.Errorf("after one read: %d", *c)
		}

		time.Sleep(500 * time.Millisecond)
		m.setCPU(id, 500*time.Millisecond)
		if c := read(); c != nil {
			t.Errorf("after half a second: %d", *c)
		}

		time.Sleep(1500 * time.Millisecond)
		m.setCPU(id, 3*time.Second)
		if c := read(); c == nil || *c != 1.5e9 {
			t.Errorf("3 s of CPU in 2 s: %v", c)
		}

		time.Sleep(time.Millisecond) // another client
		if c := read(); c == nil || *c != 1.5e9 {
			t.Errorf("second read at once: %v", c)
		}

		time.Sleep(10 * time.Second)
		if c := read(); c == nil || *c != 0 {
			t.Errorf("idle: %v", c)
		}

		m.setCPU(id, time.Second) // another process of the same container
		if c := read(); c != nil {
			t.Errorf("after the counter went back: %v", *c)
		}
	})
}

func TestForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, r := newMachine(t)
		if _, err := r.Container(id, 7); err != nil {
			t.Fatal(err)
		}

		time.Sleep(idleTimeout + time.Second)
		if _, err := r.Container("other", 8); !errdefs.IsNotFound(err) {
			t.Errorf("missing container: error %v, want NotFound", err)
		}

		if _, known := r.tracks[key{id: id}]; known {
			t.Error("unused state was not dropped")
		}
	})
}

func TestPod(t *testing.T) {
	_, r := newMachine(t)
	u, err := r.Pod(id, 7, uid)
	if err != nil || u.Memory.WorkingSet != 90 || u.Memory.RSS != 50 {
		t.Errorf("pod usage %+v, %v", u, err)
	}

	d, err := r.PodDetails(id, 7, uid)
	if err != nil || d.Memory.RSS != 50 || d.Path != "/kubepods/pod"+uid {
		t.Errorf("pod details %+v, %v", d, err)
	}

	for _, other := range []string{"", "ffff"} {
		t.Run(other, func(t *testing.T) {
			if _, err := r.Pod(id, 7, other); !errors.Is(err, ErrNoPodGroup) {
				t.Errorf("UID %q: %v", other, err)
			}
		})
	}
}

func TestAdd(t *testing.T) {
	n := uint64(5)
	var sum Usage
	one := Usage{Usage: cgroup.Usage{
		At:     time.Unix(1, 0),
		CPU:    1,
		Memory: cgroup.Memory{Usage: 2, WorkingSet: 3, RSS: 4, Faults: 5, MajorFaults: 6},
	}, NanoCores: &n}

	sum.Add(one)
	sum.Add(one)
	want := cgroup.Usage{
		At:     time.Unix(1, 0),
		CPU:    2,
		Memory: cgroup.Memory{Usage: 4, WorkingSet: 6, RSS: 8, Faults: 10, MajorFaults: 12},
	}
	if diff := cmp.Diff(want, sum.Usage); diff != "" || *sum.NanoCores != 10 || n != 5 {
		t.Errorf("%s, %d cores", diff, *sum.NanoCores)
	}
}

func TestNetwork(t *testing.T) {
	m, r := newMachine(t)
	m.write("proc/7/net/dev", `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1187655   10447    0    0    0     0          0         0  1187655   10447    0    0    0     0       0          0
  eth0:    1000      10    1    2    0     0          0         0     2000      20    3    0    0     0       0          0
`)

	got, err := r.Network(id, 7, 10)
	if diff := cmp.Diff([]Interface{{
		Name:      "eth0",
		RxBytes:   1000,
		RxPackets: 10,
		RxErrors:  1,
		RxDropped: 2,
		TxBytes:   2000,
		TxPackets: 20,
		TxErrors:  3,
	}}, got); diff != "" || err != nil {
		t.Errorf("devices differ: %s, %v", diff, err)
	}

	if _, err := r.Network("other", 8, 10); err == nil {
		t.Error("devices of a missing process")
	}
}

// TestForget expects Forget to close the files of the container and of its pod.
func TestForget(t *testing.T) {
	_, r := newMachine(t)
	before := openFiles(t)
	for range 2 {
		_, err := r.ContainerDetails(id, 7)
		_, err2 := r.Pod(id, 7, uid)
		if err = errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}

		if n := openFiles(t); n <= before {
			t.Errorf("%d files before, %d while open", before, n)
		}

		r.Forget(id)
		if n := openFiles(t); n != before {
			t.Errorf("%d files before, %d afterwards", before, n)
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestDescriptors inspects this process, because no other file system has such links.
func TestDescriptors(t *testing.T) {
	m, _ := newMachine(t)
	if err := os.Symlink("/proc/"+strconv.Itoa(os.Getpid())+"/fd", filepath.Join(m.dir, "proc/7/fd")); err != nil {
		t.Fatal(err)
	}

	k := cgroup.Kernel{Proc: filepath.Join(m.dir, "proc"), Cgroup: filepath.Join(m.dir, "cgroup")}
	m.write("cgroup/kubepods/pod"+uid+"/"+id+"/cgroup.procs", "7\n9\n") // 9 has just ended
	r := New(k)
	r.limit = func(pid int) (uint64, error) { return readSoftLimit(map[int]int{7: os.Getpid()}[pid]) }
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err != nil {
		t.Fatal(err)
	}

	count := func() counts {
		t.Helper()
		p, err := r.Descriptors(id, 7)
		if err != nil || p.Count != 2 || p.Files == nil || p.Sockets == nil || p.MaxFiles == nil ||
			*p.MaxFiles != own.Cur {
			t.Fatalf("descriptors %+v, %v", p, err)
		}
		return counts{*p.Files, *p.Sockets}
	}

	before := count()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	if after := count(); after.files <= before.files || after.sockets != before.sockets+1 {
		t.Errorf("%+v without, %+v with a socket more", before, after)
	}

	l.Close()
	r.limit = func(int) (uint64, error) { return unix.RLIM_INFINITY, nil }
	if p, err := r.Descriptors(id, 7); err != nil || p.MaxFiles != nil {
		t.Errorf("no limit: %+v, %v", p, err)
	}

	r.limit = func(int) (uint64, error) { return 0, unix.EPERM }
	if p, err := r.Descriptors(id, 7); err != nil || p.MaxFiles != nil {
		t.Errorf("an unreadable limit: %+v, %v", p, err)
	}

	const head = "Limit                     Soft Limit           Hard Limit           Units     \nMax open files    " +
		"        "
	m.write("proc/7/limits", head+"1024                 4096                 files     \n")
	if p, err := r.Descriptors(id, 7); err != nil || p.MaxFiles == nil || *p.MaxFiles != 1024 {
		t.Errorf("a limit from the file only: %+v, %v", p, err)
	}

	m.write("proc/7/limits", head+"unlimited            unlimited            files     \n")
	if p, err := r.Descriptors(id, 7); err != nil || p.MaxFiles != nil {
		t.Errorf("no limit by the file: %+v, %v", p, err)
	}

	if _, err := r.Descriptors("other", 9); !errdefs.IsNotFound(err) {
		t.Errorf("missing container: error %v, want NotFound", err)
	}
}

type counts struct{ files, sockets uint64 }

func TestDisks(t *testing.T) {
	m, r := newMachine(t)
	m.write("proc/partitions", "major minor  #blocks  name\n\n   8        0  488386584 sda\n   8        1     "+
		"524288 sda1\n 259        0  500107608 nvme0n1\n")
	for want, number := range map[string][2]uint32{"/dev/sda1": {8, 1}, "/dev/nvme0n1": {259, 0}, "": {0, 31}} {
		t.Run(want, func(t *testing.T) {
			if got := r.Device(number[0], number[1]); got != want {
				t.Errorf("device %v: %q, want %q", number, got, want)
			}
		})
	}

	fs, err := r.FileSystem(m.dir)
	if err != nil || fs.Bytes == 0 || fs.InodesFree > fs.Inodes {
		t.Errorf("file system %+v, %v", fs, err)
	}

	if fs.Disk != nil {
		t.Errorf("a disk without /proc/diskstats: %+v", fs.Disk)
	}

	var st unix.Stat_t
	if err := unix.Stat(m.dir, &st); err != nil {
		t.Fatal(err)
	}

	m.write("proc/diskstats", fmt.Sprintf(" 900       0 loop0 9 9 9 9 9 9 9 9 9 9 9\n%4d %7d sda1 1 2 3 4 5 6 7 8 9 "+
		"10 11 12 13 14 15 16 17\n", unix.Major(st.Dev), unix.Minor(st.Dev)))
	want := &Disk{
		Reads:          1,
		ReadsMerged:    2,
		SectorsRead:    3,
		ReadTime:       4 * time.Millisecond,
		Writes:         5,
		WritesMerged:   6,
		SectorsWritten: 7,
		WriteTime:      8 * time.Millisecond,
		Current:        9,
		Time:           10 * time.Millisecond,
		WeightedTime:   11 * time.Millisecond,
	}
	if fs, err := r.FileSystem(m.dir); err != nil || cmp.Diff(want, fs.Disk) != "" || fs.Used == 0 ||
		fs.Used > fs.Bytes {
		t.Errorf("file system %+v, %v; disk differs: %s", fs, err, cmp.Diff(want, fs.Disk))
	}

	m.write("proc/diskstats", "garbage\n")
	if fs, err := r.FileSystem(m.dir); err != nil || fs.Disk != nil {
		t.Errorf("garbage: %+v, %v", fs.Disk, err)
	}

	if _, err := r.FileSystem(m.dir + "/nothing"); err == nil {
		t.Error("file system of a missing directory")
	}
}

func TestLogBytes(t *testing.T) {
	m, r := newMachine(t)
	path := filepath.Join(m.dir, "logs/0.log")
	if _, err := r.LogBytes(id, path); err == nil {
		t.Error("size of a missing log")
	}

	m.write("logs/0.log", strings.Repeat("x", 10000))
	one, err := r.LogBytes(id, path)
	if err != nil || one < 10000 || one > 64<<10 {
		t.Errorf("log has %d bytes on disk, %v", one, err)
	}

	m.write("logs/0.log.20260101-000000", strings.Repeat("x", 10000))
	m.write("logs/1.log", strings.Repeat("x", 100000)) // another attempt's
	if two, err := r.LogBytes(id, path); err != nil || two != 2*one {
		t.Errorf("with a rotated file %d, %d without; %v", two, one, err)
	}

	m.write("engine/"+id+"-json.log", strings.Repeat("x", 10000))
	m.write("engine/other-json.log", strings.Repeat("x", 100000))
	for name, target := range map[string]string{
		"logs/0.log.2": "engine/" + id + "-json.log",
		"logs/0.log.3": "engine/other-json.log",
		"logs/0.log.4": "logs/1.log",
	} {
		if err := os.Symlink(filepath.Join(m.dir, target), filepath.Join(m.dir, name)); err != nil {
			t.Fatal(err)
		}
	}

	if three, err := r.LogBytes(id, path); err != nil || three != 3*one {
		t.Errorf("with one link to the engine's file of this container: %d, without %d; %v", three, one, err)
	}
}
