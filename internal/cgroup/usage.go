package cgroup

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"time"
)

// Usage is what the processes of a group have used, those of groups below it included. Pointers are
// nil where this kernel does not tell.
type Usage struct {
	At     time.Time
	CPU    uint64 // nanoseconds, of all cores together
	Memory Memory
	Swap   *Swap
	// How long processes waited (Documentation/accounting/psi.rst), on cgroup v2; on hybrid
	// machines, whose runtime uses that hierarchy too, in Details only.
	CPUPressure, MemoryPressure, IOPressure *Pressure
}

// Memory is in bytes and counts of faults.
type Memory struct {
	Usage        uint64  // page cache included
	WorkingSet   uint64  // without the page cache that can be given up at once
	RSS          uint64  // anonymous memory
	Cache        uint64  // page cache, tmpfs and shared memory included
	MappedFile   uint64  // page cache that is mapped
	ActiveFile   uint64  // page cache used lately
	InactiveFile uint64  // page cache that is given up first
	Limit        *uint64 // nil: none
	Faults       uint64
	MajorFaults  uint64
}

// Swap is in bytes.
type Swap struct {
	Usage uint64
	Limit *uint64 // nil: none
}

// Pressure is of some and of all processes.
type Pressure struct{ Some, Full Stall }

// Stall is a share of time in percent over 10, 60 and 300 seconds, and the time in all.
type Stall struct {
	Avg10, Avg60, Avg300 float64
	Total                time.Duration
}

// Details are everything that the kernel tells of a group. Pointers are nil where this kernel does
// not.
type Details struct {
	Usage
	User, System uint64      // CPU, nanoseconds; on cgroup v1 in ticks of 10 ms
	Throttling   *Throttling // of the group's own quota
	KernelMemory *uint64     // bytes
	MaxUsage     *uint64     // bytes: the most that Memory.Usage has been
	LimitHits    *uint64     // how often memory was at its limit
	OOMKills     *uint64     // processes that the OOM killer has ended
	// Faults of the group without those below it, which cgroup v2 does not keep apart.
	OwnFaults, OwnMajorFaults uint64
	Threads                   *uint64
	MaxThreads                *uint64 // nil: no limit
	Devices                   []Device
}

// Throttling is of a CPU quota (Documentation/scheduler/sched-bwc.rst).
type Throttling struct {
	Periods, Throttled uint64
	Time               uint64 // nanoseconds
}

// Device is what went to and from one block device, past the page cache.
type Device struct {
	Major, Minor          uint32
	ReadBytes, WriteBytes uint64
	Reads, Writes         uint64
}

// Parent is the group above: a pod's, if this one is that of its sandbox.
func (g *Group) Parent() *Group {
	p := &Group{kernel: g.kernel, path: filepath.Dir(g.path), v2: g.v2, hybrid: g.hybrid}
	for c, path := range g.paths {
		if path == g.path {
			p.paths[c] = p.path
		} else if path != "" {
			p.paths[c] = filepath.Dir(path)
		}
	}

	return p
}

// Path is where the group lies in its hierarchy, as cAdvisor has it: /kubepods/burstable/pod…/….
func (g *Group) Path() string { return g.path }

// Usage reads the group's figures. NotFound for a group that is gone, fs.ErrNotExist for what the
// kernel does not account for.
func (g *Group) Usage() (Usage, error) {
	d, err := g.read(false)
	return d.Usage, err
}

// Details reads all figures. Errors are those of Usage.
func (g *Group) Details() (Details, error) { return g.read(true) }

func (g *Group) read(all bool) (Details, error) {
	defer g.begin()()

	d := Details{Usage: Usage{At: time.Now()}}
	var err error
	if g.V2() {
		err = g.readV2(&d, all)
	} else {
		err = g.readV1(&d, all)
	}

	if err != nil {
		return Details{}, fmt.Errorf("%s: %w", g.path, err)
	}

	if all || !g.hybrid { // there nobody expects them, and they would cost as much as all the rest
		d.CPUPressure, d.MemoryPressure, d.IOPressure = g.stalls(cpuPressure), g.stalls(memoryPressure),
			g.stalls(ioPressure)
	}

	return d, nil
}

// workingSet is what cannot be given up at once; the kernel's counters are read one after the
// other, so it may not be negative.
func workingSet(usage, inactiveFile uint64) uint64 { return usage - min(usage, inactiveFile) }

// stalls is a file of two lines, "some avg10=0.00 avg60=0.00 avg300=0.00 total=0" and the same for
// "full"; nil without PSI, which the kernel may have and not do (EOPNOTSUPP).
func (g *Group) stalls(f file) *Pressure {
	b, err := g.content(f)
	if err != nil || len(b) == 0 {
		return nil
	}

	p := &Pressure{}
	for len(b) > 0 {
		var line, field []byte
		line, b = cut(b, '\n')
		field, line = cut(line, ' ')
		s := &p.Some
		if string(field) == "full" {
			s = &p.Full
		}

		for len(line) > 0 {
			field, line = cut(line, ' ')
			name, value := cut(field, '=')
			s.set(name, value)
		}
	}

	return p
}

func (s *Stall) set(name, value []byte) {
	switch string(name) {
	case "avg10":
		s.Avg10, _ = strconv.ParseFloat(string(value), 64)
	case "avg60":
		s.Avg60, _ = strconv.ParseFloat(string(value), 64)
	case "avg300":
		s.Avg300, _ = strconv.ParseFloat(string(value), 64)
	case "total":
		usec, _ := parse(value)
		s.Total = time.Duration(usec) * time.Microsecond
	}
}

// notTold says that a file which every kernel has is empty or not there.
func notTold(f file) error { return fmt.Errorf("%s: %w", kernelFiles[f].name, fs.ErrNotExist) }
