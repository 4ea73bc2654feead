package cgroup

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Usage is what the processes of a group have used, those of groups below it included. Pointers are nil where this kernel does not tell.
type Usage struct {
	At        time.Time
	CPU       uint64 // nanoseconds, of all cores together
	Memory    Memory
	Swap      *Swap
	Processes uint64
	// How long processes waited (Documentation/accounting/psi.rst), on cgroup v2 only.
	CPUPressure, MemoryPressure, IOPressure *Pressure
}

// Memory is in bytes and counts of faults.
type Memory struct {
	Usage       uint64  // page cache included
	WorkingSet  uint64  // without the page cache that can be given up at once
	RSS         uint64  // anonymous memory
	Limit       *uint64 // nil: none
	Faults      uint64
	MajorFaults uint64
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

// unlimited is from where on a limit of cgroup v1 means none: the kernel shows the largest number of whole pages.
const unlimited = 1 << 62

// Parent is the group above: a pod's, if this one is that of its sandbox.
func (g *Group) Parent() *Group {
	p := &Group{kernel: g.kernel, v1: map[string]string{}}
	if g.unified != "" {
		p.unified = filepath.Dir(g.unified)
	}
	for c, dir := range g.v1 {
		p.v1[c] = filepath.Dir(dir)
	}
	return p
}

// Name is the last part of the group's path.
func (g *Group) Name() string {
	if g.unified != "" {
		return filepath.Base(g.unified)
	}
	return filepath.Base(g.v1["memory"])
}

// Usage reads the group's figures. Errors are those of a group that is gone, or that the kernel does not account for.
func (g *Group) Usage() (Usage, error) {
	u, err := g.usageV1()
	if g.V2() {
		u, err = g.usageV2()
	}
	if err != nil {
		return Usage{}, err
	}
	pids, err := g.processes()
	u.Processes = uint64(len(pids))
	return u, err
}

// usageV1 reads cpuacct and memory (Documentation/admin-guide/cgroup-v1).
func (g *Group) usageV1() (Usage, error) {
	u := Usage{At: time.Now()}
	var err error
	if u.CPU, err = number(filepath.Join(g.v1["cpuacct"], "cpuacct.usage")); err != nil {
		return u, err
	}
	dir := g.v1["memory"]
	if u.Memory.Usage, err = number(filepath.Join(dir, "memory.usage_in_bytes")); err != nil {
		return u, err
	}
	stat, err := table(filepath.Join(dir, "memory.stat"))
	if err != nil {
		return u, err
	}
	u.Memory.RSS, u.Memory.Faults, u.Memory.MajorFaults = stat["total_rss"], stat["total_pgfault"], stat["total_pgmajfault"]
	u.Memory.WorkingSet = workingSet(u.Memory.Usage, stat["total_inactive_file"])
	if l := stat["hierarchical_memory_limit"]; l > 0 && l < unlimited {
		u.Memory.Limit = &l
	}
	if swap, known := stat["total_swap"]; known { // with swap accounting only
		u.Swap = &Swap{Usage: swap}
		if l := stat["hierarchical_memsw_limit"]; l > 0 && l < unlimited && u.Memory.Limit != nil {
			most := l - min(l, *u.Memory.Limit)
			u.Swap.Limit = &most
		}
	}
	return u, nil
}

// usageV2 reads cpu, memory and the pressures (Documentation/admin-guide/cgroup-v2.rst).
func (g *Group) usageV2() (Usage, error) {
	u := Usage{At: time.Now()}
	cpu, err := table(filepath.Join(g.unified, "cpu.stat"))
	if err != nil {
		return u, err
	}
	u.CPU = cpu["usage_usec"] * uint64(time.Microsecond)
	if u.Memory.Usage, err = number(filepath.Join(g.unified, "memory.current")); err != nil {
		return u, err
	}
	stat, err := table(filepath.Join(g.unified, "memory.stat"))
	if err != nil {
		return u, err
	}
	u.Memory.RSS, u.Memory.Faults, u.Memory.MajorFaults = stat["anon"], stat["pgfault"], stat["pgmajfault"]
	u.Memory.WorkingSet = workingSet(u.Memory.Usage, stat["inactive_file"])
	u.Memory.Limit = limit(filepath.Join(g.unified, "memory.max"))
	if swap, err := number(filepath.Join(g.unified, "memory.swap.current")); err == nil {
		u.Swap = &Swap{Usage: swap, Limit: limit(filepath.Join(g.unified, "memory.swap.max"))}
	}
	u.CPUPressure, u.MemoryPressure, u.IOPressure = pressure(filepath.Join(g.unified, "cpu.pressure")), pressure(filepath.Join(g.unified, "memory.pressure")), pressure(filepath.Join(g.unified, "io.pressure"))
	return u, nil
}

// workingSet is what cannot be given up at once; the kernel's counters are read one after the other, so it may not be negative.
func workingSet(usage, inactiveFile uint64) uint64 { return usage - min(usage, inactiveFile) }

// number is a file's only number.
func number(file string) (uint64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(bytes.TrimSpace(b)), 10, 64)
}

// limit is a file's number, nil for "max" or none.
func limit(file string) *uint64 {
	n, err := number(file)
	if err != nil {
		return nil
	}
	return &n
}

// table is a file of lines with a name and a number.
func table(file string) (map[string]uint64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	out := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil {
			out[name] = n
		}
	}
	if len(out) == 0 {
		return nil, errors.Join(errors.New(file+" is empty"), fs.ErrNotExist)
	}
	return out, nil
}

// pressure is a file of two lines, "some avg10=0.00 avg60=0.00 avg300=0.00 total=0" and the same for "full"; nil without PSI.
func pressure(file string) *Pressure {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil // also EOPNOTSUPP: PSI is not enabled
	}
	p := &Pressure{}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		s := &p.Some
		if fields[0] == "full" {
			s = &p.Full
		}
		for _, f := range fields[1:] {
			name, value, _ := strings.Cut(f, "=")
			switch name {
			case "avg10":
				s.Avg10, _ = strconv.ParseFloat(value, 64)
			case "avg60":
				s.Avg60, _ = strconv.ParseFloat(value, 64)
			case "avg300":
				s.Avg300, _ = strconv.ParseFloat(value, 64)
			case "total":
				usec, _ := strconv.ParseUint(value, 10, 64)
				s.Total = time.Duration(usec) * time.Microsecond
			}
		}
	}
	return p
}
