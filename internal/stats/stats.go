// Package stats reads what containers and pods use from the kernel: control groups, network devices, mounts. It never asks the engine, and does
// work only when it is asked.
package stats

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"cri-dockerd/internal/cgroup"
)

// Usage is what a control group has used, and how much of the cores it took lately.
type Usage struct {
	cgroup.Usage
	NanoCores *uint64 // billionths of a core over the last second or more; nil before there are two readings
}

// Add adds what another group has used, for pods whose containers have no group in common. Limits and pressures of many groups cannot be added.
func (u *Usage) Add(o Usage) {
	if o.At.After(u.At) {
		u.At = o.At
	}
	u.CPU += o.CPU
	u.Memory.Usage += o.Memory.Usage
	u.Memory.WorkingSet += o.Memory.WorkingSet
	u.Memory.RSS += o.Memory.RSS
	u.Memory.Faults += o.Memory.Faults
	u.Memory.MajorFaults += o.Memory.MajorFaults
	u.Processes += o.Processes
	if o.NanoCores != nil {
		cores := *o.NanoCores
		if u.NanoCores != nil {
			cores += *u.NanoCores
		}
		u.NanoCores = &cores
	}
}

// Interface is a network device with its counters since it was made.
type Interface struct {
	Name                                 string
	RxBytes, RxErrors, TxBytes, TxErrors uint64
}

const (
	coresOver = time.Second      // the shortest time over which the use of cores is told
	forgotten = 10 * time.Minute // what nobody has asked for so long is forgotten
)

// Reader reads figures. It is safe for concurrent use.
type Reader struct {
	kernel cgroup.Kernel

	mu     sync.Mutex // guards the rest
	tracks map[string]*track
	swept  time.Time
}

// track is what is remembered of a control group between readings.
type track struct {
	group *cgroup.Group
	pid   int
	upper *string
	asked time.Time

	// The reading from which the use of cores is counted, and what came of the one before.
	at    time.Time
	cpu   uint64
	cores *uint64
}

// New reads from this kernel.
func New(k cgroup.Kernel) *Reader { return &Reader{kernel: k, tracks: map[string]*track{}} }

// Container is what a container whose main process this is has used. NotFound if it has ended.
func (r *Reader) Container(id string, pid int) (Usage, error) {
	g, err := r.group(id, pid)
	if err != nil {
		return Usage{}, err
	}
	return r.read(id, g)
}

// Pod is what a pod has used: the control group above that of its sandbox, whose pause process this is, if it is the pod's own, which its UID in
// the name tells. ErrNoPodGroup if the pod has none.
func (r *Reader) Pod(id string, pid int, uid string) (Usage, error) {
	g, err := r.group(id, pid)
	if err != nil {
		return Usage{}, err
	}
	pod := g.Parent()
	// systemd's slices have the UID with low lines, since a dash is a level of its own.
	if name := pod.Name(); uid == "" || !strings.Contains(name, uid) && !strings.Contains(name, strings.ReplaceAll(uid, "-", "_")) {
		return Usage{}, ErrNoPodGroup
	}
	return r.read("pod of "+id, pod)
}

// ErrNoPodGroup says that a pod's containers lie in a control group that is not theirs alone.
var ErrNoPodGroup = errors.New("the pod has no control group of its own")

// group finds a control group, once for each process.
func (r *Reader) group(id string, pid int) (*cgroup.Group, error) {
	r.mu.Lock()
	t := r.track(id)
	g := t.group
	if t.pid != pid {
		g = nil
	}
	r.mu.Unlock()
	if g != nil {
		return g, nil
	}
	g, err := r.kernel.Of(pid, id)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t.group, t.pid, t.upper = g, pid, nil
	return g, nil
}

// track is what is remembered of an ID. It is called with mu held.
func (r *Reader) track(id string) *track {
	now := time.Now()
	if now.Sub(r.swept) > forgotten {
		r.swept = now
		for id, t := range r.tracks {
			if now.Sub(t.asked) > forgotten {
				delete(r.tracks, id)
			}
		}
	}
	t := r.tracks[id]
	if t == nil {
		t = &track{}
		r.tracks[id] = t
	}
	t.asked = now
	return t
}

func (r *Reader) read(id string, g *cgroup.Group) (Usage, error) {
	u, err := g.Usage()
	if err != nil {
		return Usage{}, fmt.Errorf("control group of %s: %w", id, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.track(id)
	if since := u.At.Sub(t.at); t.at.IsZero() || u.CPU < t.cpu {
		t.at, t.cpu, t.cores = u.At, u.CPU, nil
	} else if since >= coresOver {
		cores := uint64(float64(u.CPU-t.cpu) / since.Seconds())
		t.at, t.cpu, t.cores = u.At, u.CPU, &cores
	}
	return Usage{Usage: u, NanoCores: t.cores}, nil
}

// Network are the devices in a process's network namespace, without lo (proc_pid_net(5), dev).
func (r *Reader) Network(pid int) ([]Interface, error) {
	b, err := os.ReadFile(filepath.Join(r.kernel.Proc, strconv.Itoa(pid), "net/dev"))
	if err != nil {
		return nil, fmt.Errorf("network devices of process %d: %w", pid, err)
	}
	var out []Interface
	for line := range strings.Lines(string(b)) {
		name, counters, ok := strings.Cut(line, ":")
		f := strings.Fields(counters)
		if name = strings.TrimSpace(name); !ok || name == "lo" || len(f) < 16 {
			continue
		}
		n := func(i int) uint64 { v, _ := strconv.ParseUint(f[i], 10, 64); return v }
		out = append(out, Interface{Name: name, RxBytes: n(0), RxErrors: n(2), TxBytes: n(8), TxErrors: n(10)})
	}
	return out, nil
}

// WritableLayer is the directory of a container's writable layer: the upper directory of the overlay that is its process's root, beneath base if
// Docker mounted it by a relative path; "" if its root is none.
func (r *Reader) WritableLayer(id string, pid int, base string) string {
	if _, err := r.group(id, pid); err != nil {
		return ""
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.track(id)
	if t.upper == nil {
		upper := r.upperDir(pid)
		if upper != "" && !filepath.IsAbs(upper) {
			upper = filepath.Join(base, upper)
		}
		t.upper = &upper
	}
	return *t.upper
}

// upperDir reads the root's mount (proc_pid_mountinfo(5)).
func (r *Reader) upperDir(pid int) string {
	b, err := os.ReadFile(filepath.Join(r.kernel.Proc, strconv.Itoa(pid), "mountinfo"))
	if err != nil {
		return ""
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		mount, rest, _ := strings.Cut(lines.Text(), " - ")
		f := strings.Fields(mount)
		if len(f) < 5 || f[4] != "/" || !strings.HasPrefix(rest, "overlay ") {
			continue
		}
		_, upper, _ := strings.Cut(rest, ",upperdir=")
		upper, _, _ = strings.Cut(upper, ",")
		return upper
	}
	return ""
}
