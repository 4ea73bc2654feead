package cgroup

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"time"
)

// Usage is the resource usage of a group, including the groups below it. Pointers are nil if this
// kernel does not report the value.
type Usage struct {
	At     time.Time
	CPU    uint64 // nanoseconds, of all cores together
	Memory Memory
	Swap   *Swap
	// Time processes spent waiting (Documentation/accounting/psi.rst), on cgroup v2. On hybrid
	// machines whose runtime also uses that hierarchy, only Details has it.
	CPUPressure, MemoryPressure, IOPressure *Pressure
}

// Memory holds bytes and counts of page faults.
type Memory struct {
	Usage        uint64  // page cache included
	WorkingSet   uint64  // without page cache that can be reclaimed at once
	RSS          uint64  // anonymous memory
	Cache        uint64  // page cache, tmpfs and shared memory included
	MappedFile   uint64  // mapped page cache
	ActiveFile   uint64  // recently used page cache
	InactiveFile uint64  // page cache to be reclaimed first
	Limit        *uint64 // nil without a limit
	Faults       uint64
	MajorFaults  uint64
}

// Swap holds bytes.
type Swap struct {
	Usage uint64
	Limit *uint64 // nil without a limit
}

// Pressure is the stall time of some and of all processes.
type Pressure struct{ Some, Full Stall }

// Stall is a share of time in percent, averaged over 10, 60 and 300 seconds, and the total time.
type Stall struct {
	Avg10, Avg60, Avg300 float64
	Total                time.Duration
}

// Details holds all values reported by the kernel for a group. Pointers are nil if this kernel does
// not report the value.
type Details struct {
	Usage
	User, System uint64      // CPU, nanoseconds; multiples of 10 ms on cgroup v1
	Throttling   *Throttling // by the group's own quota
	KernelMemory *uint64     // bytes
	MaxUsage     *uint64     // bytes, peak of Memory.Usage
	LimitHits    *uint64     // times memory reached its limit
	HighHits     *uint64     // times memory exceeded memory.high; 0 on cgroup v1
	OOMKills     *uint64     // processes killed by the OOM killer
	// Page faults of the group without the groups below it. cgroup v2 does not separate them.
	OwnFaults, OwnMajorFaults uint64
	Threads                   *uint64
	MaxThreads                *uint64 // nil without a limit
	Devices                   []Device
}

// Throttling describes the effect of a CPU quota (Documentation/scheduler/sched-bwc.rst).
type Throttling struct {
	Periods, Throttled uint64
	Time               uint64 // nanoseconds
}

// Device counts the I/O of one block device, below the page cache.
type Device struct {
	Major, Minor          uint32
	ReadBytes, WriteBytes uint64
	Reads, Writes         uint64
}

// Parent returns the parent group. For a container in a pod's group this is the pod's.
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

// Path returns the group's path in its hierarchy in cAdvisor's format: /kubepods/burstable/pod…/….
func (g *Group) Path() string { return g.path }

// Usage reads the group's usage. It returns NotFound if the group has been removed, and
// fs.ErrNotExist if the kernel does not account for a resource.
func (g *Group) Usage() (Usage, error) {
	d, err := g.read(false)
	return d.Usage, err
}

// Details reads all values. Errors are those of Usage.
func (g *Group) Details() (Details, error) { return g.read(true) }

func (g *Group) read(all bool) (Details, error) {
	defer g.beginRead()()

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

	if all || !g.hybrid { // expensive on hybrid machines, as much as the rest, and not expected there
		d.CPUPressure, d.MemoryPressure, d.IOPressure = g.readPressure(cpuPressure), g.readPressure(memoryPressure),
			g.readPressure(ioPressure)
	}

	return d, nil
}

// workingSet returns memory that cannot be reclaimed at once. The kernel's counters are read one
// after the other, so the difference must be kept from becoming negative.
func workingSet(usage, inactiveFile uint64) uint64 { return usage - min(usage, inactiveFile) }

// readPressure reads a pressure file of two lines, "some avg10=0.00 avg60=0.00 avg300=0.00 total=0"
// and the same for "full". It returns nil without PSI. A kernel may list the file and refuse to
// read it (EOPNOTSUPP).
func (g *Group) readPressure(f file) *Pressure {
	b, err := g.readContent(f)
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

// newMissingFileError returns the error for a mandatory file that is empty or missing.
func newMissingFileError(f file) error {
	return fmt.Errorf("%s: %w", kernelFiles[f].name, fs.ErrNotExist)
}
