// Package stats reads what containers and pods use from the kernel: control groups, network
// devices, mounts. It never asks the engine, and does work only when it is asked.
package stats

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/model"
)

// Usage is what a control group has used, and how much of the cores it took lately.
type Usage struct {
	cgroup.Usage
	// billionths of a core over the last second or more; nil before there are two readings
	NanoCores *uint64
}

// Add adds what another group has used, for pods whose containers have no group in common. Limits
// and pressures of many groups cannot be added.
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
	if o.NanoCores != nil {
		cores := *o.NanoCores
		if u.NanoCores != nil {
			cores += *u.NanoCores
		}
		u.NanoCores = &cores
	}
}

// Details are everything that the kernel tells of a control group.
type Details struct {
	cgroup.Details
	Path      string // of the group, as cAdvisor has it
	HugePages []cgroup.HugePages
}

const (
	coresOver = time.Second      // the shortest time over which the use of cores is told
	forgotten = 10 * time.Minute // what nobody has asked for so long is forgotten
)

// Reader reads figures. It is safe for concurrent use.
type Reader struct {
	kernel cgroup.Kernel
	disks  disks
	limit  func(pid int) (uint64, error) // softLimit, but in tests

	mu     sync.Mutex // guards the rest
	tracks map[key]*track
	swept  time.Time
	sizes  []model.PageSize // of huge pages that this machine has
	sized  time.Time
}

// key names a control group: a container's, or that above it.
type key struct {
	id  string
	pod bool
}

// track is what is remembered of a control group between readings.
type track struct {
	group *cgroup.Group
	pid   int
	asked time.Time

	// The reading from which the use of cores is counted, and what came of the one before.
	at    time.Time
	cpu   uint64
	cores *uint64
}

// close gives back what a track holds.
func (t *track) close() {
	if t.group != nil {
		t.group.Close()
	}
}

// New reads from this kernel.
func New(k cgroup.Kernel) *Reader {
	return &Reader{
		kernel: k,
		disks:  disks{file: filepath.Join(k.Proc, "partitions")},
		limit:  softLimit,
		tracks: map[key]*track{},
	}
}

// Container is what a container whose main process this is has used. NotFound if it has ended.
func (r *Reader) Container(id string, pid int) (Usage, error) {
	g, err := r.group(key{id: id}, pid)
	if err != nil {
		return Usage{}, err
	}
	return r.usage(key{id: id}, g)
}

// Pod is what the pod of a container or pause whose main process this is has used: the control
// group above its own, if it is the pod's, which the pod's UID in its name tells. ErrNoPodGroup if
// the pod has none.
func (r *Reader) Pod(id string, pid int, uid string) (Usage, error) {
	g, err := r.podGroup(id, pid, uid)
	if err != nil {
		return Usage{}, err
	}
	return r.usage(key{id: id, pod: true}, g)
}

// ContainerDetails are everything that is told of a container. NotFound if it has ended.
func (r *Reader) ContainerDetails(id string, pid int) (Details, error) {
	g, err := r.group(key{id: id}, pid)
	if err != nil {
		return Details{}, err
	}
	return r.details(id, g)
}

// PodDetails are everything that is told of a pod. Errors are those of Pod.
func (r *Reader) PodDetails(id string, pid int, uid string) (Details, error) {
	g, err := r.podGroup(id, pid, uid)
	if err != nil {
		return Details{}, err
	}
	return r.details(id, g)
}

// Path is where the control group of a container lies, as cAdvisor has it; "" if it has ended.
func (r *Reader) Path(id string, pid int) string {
	g, err := r.group(key{id: id}, pid)
	if err != nil {
		return ""
	}
	return g.Path()
}

// Processes is how many a container has. NotFound if it has ended.
func (r *Reader) Processes(id string, pid int) (uint64, error) {
	g, err := r.group(key{id: id}, pid)
	if err != nil {
		return 0, err
	}
	return g.Processes()
}

// ErrNoPodGroup says that a pod's containers lie in a control group that is not theirs alone.
var ErrNoPodGroup = errors.New("the pod has no control group of its own")

// Forget gives back what is held for reading a container, or pause, that is being removed. It may
// be asked for again.
func (r *Reader) Forget(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()

	for _, k := range []key{{id: id}, {id: id, pod: true}} {
		if t := r.tracks[k]; t != nil {
			t.close()
			delete(r.tracks, k)
		}
	}
}

// group finds a control group, once for each process.
func (r *Reader) group(k key, pid int) (*cgroup.Group, error) {
	r.mu.Lock()
	t := r.track(k)
	g := t.group
	if t.pid != pid {
		g = nil
	}

	r.mu.Unlock()
	if g != nil {
		return g, nil
	}

	g, err := r.kernel.Of(pid, k.id)
	if err != nil {
		return nil, err
	}

	if k.pod {
		own := g
		g = own.Parent()
		own.Close()
	}

	r.mu.Lock()
	defer r.mu.Unlock()

	if t = r.track(k); t.group != nil && t.pid == pid { // another caller was faster
		g.Close()
		return t.group, nil
	}

	t.close()
	t.group, t.pid = g, pid

	return g, nil
}

// podGroup finds a pod's control group.
func (r *Reader) podGroup(id string, pid int, uid string) (*cgroup.Group, error) {
	g, err := r.group(key{id: id, pod: true}, pid)
	if err != nil {
		return nil, err
	}

	if uid == "" || !isPodGroup(filepath.Base(g.Path()), uid) {
		return nil, ErrNoPodGroup
	}

	return g, nil
}

// isPodGroup says whether a group has the name that the kubelet gives that of a pod: pod<UID>, or
// as systemd's slice kubepods-…-pod<UID>.slice, where the UID has low lines, since a dash is a
// level of its own.
func isPodGroup(name, uid string) bool {
	slice, ok := strings.CutSuffix(name, ".slice")
	return name == "pod"+uid || ok && strings.HasSuffix("-"+slice, "-pod"+strings.ReplaceAll(uid, "-", "_"))
}

// track is what is remembered of a control group. It is called with mu held.
func (r *Reader) track(k key) *track {
	now := time.Now()
	if now.Sub(r.swept) > forgotten {
		r.swept = now
		for k, t := range r.tracks {
			if now.Sub(t.asked) > forgotten {
				t.close()
				delete(r.tracks, k)
			}
		}
	}

	t := r.tracks[k]
	if t == nil {
		t = &track{}
		r.tracks[k] = t
	}

	t.asked = now

	return t
}

func (r *Reader) usage(k key, g *cgroup.Group) (Usage, error) {
	u, err := g.Usage()
	if err != nil {
		return Usage{}, fmt.Errorf("figures of %s: %w", k.id, err)
	}

	r.mu.Lock()
	defer r.mu.Unlock()

	t := r.track(k)
	if since := u.At.Sub(t.at); t.at.IsZero() || u.CPU < t.cpu {
		t.at, t.cpu, t.cores = u.At, u.CPU, nil
	} else if since >= coresOver {
		cores := uint64(float64(u.CPU-t.cpu) / since.Seconds())
		t.at, t.cpu, t.cores = u.At, u.CPU, &cores
	}

	return Usage{Usage: u, NanoCores: t.cores}, nil
}

func (r *Reader) details(id string, g *cgroup.Group) (Details, error) {
	d, err := g.Details()
	if err != nil {
		return Details{}, fmt.Errorf("figures of %s: %w", id, err)
	}
	return Details{Details: d, Path: g.Path(), HugePages: g.HugePages(r.pageSizes())}, nil
}

// sizesFresh is how long the sizes of huge pages are taken for known: they change when an
// administrator reserves some.
const sizesFresh = 10 * time.Second

func (r *Reader) pageSizes() []model.PageSize {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); now.Sub(r.sized) > sizesFresh {
		r.sized, r.sizes = now, r.kernel.PageSizes()
	}
	return r.sizes
}

// buffers are for files that are read whole; most fit.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 8<<10); return &b }}

// maxProcessFile bounds what is read of a process's file.
const maxProcessFile = 64 << 10

// processFile gives the content of a file of a container's main process to look (proc_pid(5)),
// which must not keep it.
func processFile(g *cgroup.Group, name string, look func(content []byte)) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)

	b, err := g.ReadProcess(name, (*buf)[:0], maxProcessFile)
	if err == nil {
		*buf = b
		look(b)
	}

	return err
}
