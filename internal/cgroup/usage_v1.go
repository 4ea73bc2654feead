package cgroup

import "time"

// unlimited is the lower bound of cgroup v1 limits that mean none. The kernel reports the largest
// number of whole pages.
const unlimited = 1 << 62

// tick is the unit of cpuacct.stat, USER_HZ. It is 100 on all architectures supported by Docker.
const tick = uint64(10 * time.Millisecond)

// readV1 reads the controllers of cgroup v1 (Documentation/admin-guide/cgroup-v1).
func (g *Group) readV1(d *Details, all bool) error {
	var err error
	if d.CPU, err = g.readCounter(cpuacctUsage); err != nil {
		return err
	}

	if d.Memory.Usage, err = g.readCounter(memoryUsage); err != nil {
		return err
	}

	if err := g.readMemoryStatV1(d); err != nil {
		return err
	}

	if !all {
		return nil
	}

	// The kernel may lack any of the following files.
	_ = g.readTable(cpuacctStat, func(name []byte, n uint64) {
		switch string(name) {
		case "user":
			d.User = n * tick
		case "system":
			d.System = n * tick
		}
	})

	_ = g.readTable(cpuStat1, func(name []byte, n uint64) {
		switch string(name) {
		case "nr_periods":
			d.Throttling = &Throttling{Periods: n}
		case "nr_throttled":
			d.Throttling.Throttled = n
		case "throttled_time":
			d.Throttling.Time = n
		}
	})

	d.KernelMemory = g.readOptional(kmemUsage)
	d.MaxUsage, d.LimitHits = g.readOptional(memoryMaxUsage), g.readOptional(memoryFailcnt)
	d.HighHits = ptr(0)
	_ = g.readTable(memoryOOMControl, func(name []byte, n uint64) {
		if string(name) == "oom_kill" {
			d.OOMKills = ptr(n)
		}
	})

	d.Threads, d.MaxThreads = g.readOptional(pidsCurrent1), g.readOptional(pidsMax1)
	g.readBlkio(d, blkioBytes, func(x *Device) (read, write *uint64) { return &x.ReadBytes, &x.WriteBytes })
	g.readBlkio(d, blkioOperations, func(x *Device) (read, write *uint64) { return &x.Reads, &x.Writes })

	return nil
}

// readMemoryStatV1 reads memory.stat. Names with total_ include the groups below.
func (g *Group) readMemoryStatV1(d *Details) error {
	m, known := &d.Memory, false
	var swap *uint64
	var memorySwap uint64
	err := g.readTable(memoryStat1, func(name []byte, n uint64) {
		switch string(name) {
		case "total_cache":
			m.Cache = n
		case "total_rss":
			m.RSS, known = n, true
		case "total_mapped_file":
			m.MappedFile = n
		case "total_active_file":
			m.ActiveFile = n
		case "total_inactive_file":
			m.InactiveFile = n
		case "pgfault":
			d.OwnFaults = n
		case "pgmajfault":
			d.OwnMajorFaults = n
		case "total_pgfault":
			m.Faults = n
		case "total_pgmajfault":
			m.MajorFaults = n
		case "hierarchical_memory_limit":
			if n > 0 && n < unlimited {
				m.Limit = ptr(n)
			}

		case "hierarchical_memsw_limit":
			memorySwap = n
		case "total_swap": // with swap accounting only
			swap = ptr(n)
		}
	})
	if err == nil && !known {
		err = newMissingFileError(memoryStat1)
	}

	m.WorkingSet = workingSet(m.Usage, m.InactiveFile)
	if swap != nil {
		d.Swap = &Swap{Usage: *swap}
		if memorySwap > 0 && memorySwap < unlimited && m.Limit != nil {
			most := memorySwap - min(memorySwap, *m.Limit)
			d.Swap.Limit = &most
		}
	}

	return err
}

// readBlkio reads a file with lines like "8:0 Read 4096", and a total at the end.
func (g *Group) readBlkio(d *Details, f file, counters func(*Device) (read, write *uint64)) {
	b, err := g.readContent(f)
	if err != nil {
		return
	}

	for len(b) > 0 {
		var line []byte
		line, b = cut(b, '\n')
		device, rest := cut(line, ' ')
		operation, value := cut(rest, ' ')
		n, err := parse(value)
		x := d.findDevice(device)
		if err != nil || x == nil {
			continue
		}

		read, write := counters(x)
		switch string(operation) {
		case "Read":
			*read = n
		case "Write":
			*write = n
		}
	}
}

// findDevice returns the counters of a device given as "8:0", and adds them if necessary. It
// returns nil for an invalid name.
func (d *Details) findDevice(name []byte) *Device {
	a, b := cut(name, ':')
	major, err := parse(a)
	minor, err2 := parse(b)
	if err != nil || err2 != nil {
		return nil
	}

	for i := range d.Devices {
		if x := &d.Devices[i]; x.Major == uint32(major) && x.Minor == uint32(minor) {
			return x
		}
	}

	d.Devices = append(d.Devices, Device{Major: uint32(major), Minor: uint32(minor)})

	return &d.Devices[len(d.Devices)-1]
}
