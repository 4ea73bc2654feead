// Package stats reads the resource usage of containers and pods from the kernel: control groups,
// network devices, mounts. It never calls the engine, and works only on request.
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

// Usage is the resource usage of a control group, with its recent CPU usage.
type Usage struct {
	cgroup.Usage
	// NanoCores is the CPU usage, in billionths of a core, over the last second or more. It is nil
	// before the second read.
	NanoCores *uint64
}

// Add adds the usage of another group, for pods whose containers have no common group. Limits and
// pressures of several groups cannot be added.
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

// Details holds all values reported by the kernel for a control group.
type Details struct {
	cgroup.Details
	Path      string // of the group, in cAdvisor's format
	HugePages []cgroup.HugePages
}

const (
	minCoresInterval = time.Second      // minimum interval of NanoCores
	idleTimeout      = 10 * time.Minute // unused state is dropped after this time
)

// Reader reads stats. It is safe for concurrent use.
type Reader struct {
	kernel cgroup.Kernel
	disks  disks
	limit  func(pid int) (uint64, error) // readSoftLimit, except in tests

	mu     sync.Mutex // guards the fields below
	tracks map[key]*track
	swept  time.Time
	sizes  []model.PageSize // of this machine's huge pages
	sized  time.Time
}

// key identifies a control group: a container's, or its parent.
type key struct {
	id  string
	pod bool
}

// track is the state of a control group between reads.
type track struct {
	group    *cgroup.Group
	pid      int
	lastUsed time.Time

	// The base for the next NanoCores, and the last value.
	at    time.Time
	cpu   uint64
	cores *uint64
}

// close releases the descriptors of a track.
func (t *track) close() {
	if t.group != nil {
		t.group.Close()
	}
}

// New returns a Reader of this kernel.
func New(k cgroup.Kernel) *Reader {
	return &Reader{
		kernel: k,
		disks:  disks{file: filepath.Join(k.Proc, "partitions")},
		limit:  readSoftLimit,
		tracks: map[key]*track{},
	}
}

// Container returns the usage of a container, given its main process. It returns NotFound if the
// container has ended.
func (r *Reader) Container(id string, pid int) (Usage, error) {
	g, err := r.findGroup(key{id: id}, pid)
	if err != nil {
		return Usage{}, err
	}
	return r.readUsage(key{id: id}, g)
}

// Pod returns the usage of a pod, given the main process of one of its containers or of its pause.
// It reads the parent control group, and requires the pod's UID in its name. Otherwise it returns
// ErrNoPodGroup.
func (r *Reader) Pod(id string, pid int, uid string) (Usage, error) {
	g, err := r.findPodGroup(id, pid, uid)
	if err != nil {
		return Usage{}, err
	}
	return r.readUsage(key{id: id, pod: true}, g)
}

// ContainerDetails returns all values of a container. It returns NotFound if the container has
// ended.
func (r *Reader) ContainerDetails(id string, pid int) (Details, error) {
	g, err := r.findGroup(key{id: id}, pid)
	if err != nil {
		return Details{}, err
	}
	return r.readDetails(id, g)
}

// PodDetails returns all values of a pod. Errors are those of Pod.
func (r *Reader) PodDetails(id string, pid int, uid string) (Details, error) {
	g, err := r.findPodGroup(id, pid, uid)
	if err != nil {
		return Details{}, err
	}
	return r.readDetails(id, g)
}

// Path returns the path of a container's control group in cAdvisor's format, or "" if the container
// has ended.
func (r *Reader) Path(id string, pid int) string {
	g, err := r.findGroup(key{id: id}, pid)
	if err != nil {
		return ""
	}
	return g.Path()
}

// Processes returns the number of processes of a container. It returns NotFound if the container
// has ended.
func (r *Reader) Processes(id string, pid int) (uint64, error) {
	g, err := r.findGroup(key{id: id}, pid)
	if err != nil {
		return 0, err
	}
	return g.Processes()
}

// ErrNoPodGroup is returned if a pod's containers share their parent control group with others.
var ErrNoPodGroup = errors.New("the pod has no control group of its own")

// Forget releases the descriptors of a container, or pause, that is being removed. A later read may
// open them again.
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

// findGroup finds a control group, once per process.
func (r *Reader) findGroup(k key, pid int) (*cgroup.Group, error) {
	r.mu.Lock()
	t := r.trackLocked(k)
	g := t.group
	if t.pid != pid {
		g = nil
	}

	r.mu.Unlock()
	if g != nil {
		return g, nil
	}

	g, err := r.kernel.FindGroup(pid, k.id)
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

	if t = r.trackLocked(k); t.group != nil && t.pid == pid { // another caller was faster
		g.Close()
		return t.group, nil
	}

	t.close()
	t.group, t.pid = g, pid

	return g, nil
}

// findPodGroup finds a pod's control group.
func (r *Reader) findPodGroup(id string, pid int, uid string) (*cgroup.Group, error) {
	g, err := r.findGroup(key{id: id, pod: true}, pid)
	if err != nil {
		return nil, err
	}

	if uid == "" || !isPodGroup(filepath.Base(g.Path()), uid) {
		return nil, ErrNoPodGroup
	}

	return g, nil
}

// isPodGroup reports whether a group has the kubelet's name for a pod: pod<UID>, or
// kubepods-…-pod<UID>.slice with systemd. In a slice the UID has underscores, because a dash
// separates levels.
func isPodGroup(name, uid string) bool {
	slice, ok := strings.CutSuffix(name, ".slice")
	return name == "pod"+uid || ok && strings.HasSuffix("-"+slice, "-pod"+strings.ReplaceAll(uid, "-", "_"))
}

// trackLocked returns the state of a control group, and drops unused states.
func (r *Reader) trackLocked(k key) *track {
	now := time.Now()
	if now.Sub(r.swept) > idleTimeout {
		r.swept = now
		for k, t := range r.tracks {
			if now.Sub(t.lastUsed) > idleTimeout {
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

	t.lastUsed = now

	return t
}

func (r *Reader) readUsage(k key, g *cgroup.Group) (Usage, error) {
	u, err := g.Usage()
	if err != nil {
		return Usage{}, fmt.Errorf("read stats of %s: %w", k.id, err)
	}

	r.mu.Lock()
	defer r.mu.Unlock()

	t := r.trackLocked(k)
	if since := u.At.Sub(t.at); t.at.IsZero() || u.CPU < t.cpu {
		t.at, t.cpu, t.cores = u.At, u.CPU, nil
	} else if since >= minCoresInterval {
		cores := uint64(float64(u.CPU-t.cpu) / since.Seconds())
		t.at, t.cpu, t.cores = u.At, u.CPU, &cores
	}

	return Usage{Usage: u, NanoCores: t.cores}, nil
}

func (r *Reader) readDetails(id string, g *cgroup.Group) (Details, error) {
	d, err := g.Details()
	if err != nil {
		return Details{}, fmt.Errorf("read stats of %s: %w", id, err)
	}
	return Details{Details: d, Path: g.Path(), HugePages: g.HugePages(r.pageSizes())}, nil
}

// pageSizesTTL limits the age of the cached sizes of huge pages. They change when an administrator
// reserves huge pages.
const pageSizesTTL = 10 * time.Second

func (r *Reader) pageSizes() []model.PageSize {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); now.Sub(r.sized) > pageSizesTTL {
		r.sized, r.sizes = now, r.kernel.PageSizes()
	}
	return r.sizes
}

// buffers holds buffers for entire files. Most files fit.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 8<<10); return &b }}

// maxProcessFile limits the read of a process's file, in bytes.
const maxProcessFile = 64 << 10

// processFile calls use with the content of a file of a container's main process (proc_pid(5)). use
// must not retain the content.
func processFile(g *cgroup.Group, name string, use func(content []byte)) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)

	b, err := g.ReadProcess(name, (*buf)[:0], maxProcessFile)
	if err == nil {
		*buf = b
		use(b)
	}

	return err
}
