package cgroup

import "time"

// usec is the unit of cpu.stat.
const usec = uint64(time.Microsecond)

// readV2 reads cgroup v2 (Documentation/admin-guide/cgroup-v2.rst).
func (g *Group) readV2(d *Details, all bool) error {
	if err := g.readCPUStat(d); err != nil {
		return err
	}

	var err error
	if d.Memory.Usage, err = g.readCounter(memoryCurrent); err != nil {
		return err
	}

	if err := g.readMemoryStat(d); err != nil {
		return err
	}

	d.Memory.Limit = g.readOptional(memoryMax)
	if swap := g.readOptional(swapCurrent); swap != nil {
		d.Swap = &Swap{Usage: *swap, Limit: g.readOptional(swapMax)}
	}
	if !all {
		return nil
	}

	// The kernel may lack any of the following files.
	d.MaxUsage = g.readOptional(memoryPeak)
	_ = g.readTable(memoryEvents, func(name []byte, n uint64) {
		switch string(name) {
		case "high":
			d.HighHits = ptr(n)
		case "max":
			d.LimitHits = ptr(n)
		case "oom_kill":
			d.OOMKills = ptr(n)
		}
	})

	d.OwnFaults, d.OwnMajorFaults = d.Memory.Faults, d.Memory.MajorFaults
	d.Threads, d.MaxThreads = g.readOptional(pidsCurrent), g.readOptional(pidsMax)
	g.readIOStat(d)

	return nil
}

func (g *Group) readCPUStat(d *Details) error {
	known := false
	err := g.readTable(cpuStat, func(name []byte, n uint64) {
		switch string(name) {
		case "usage_usec":
			d.CPU, known = n*usec, true
		case "user_usec":
			d.User = n * usec
		case "system_usec":
			d.System = n * usec
		case "nr_periods":
			d.Throttling = &Throttling{Periods: n}
		case "nr_throttled":
			d.Throttling.Throttled = n
		case "throttled_usec":
			d.Throttling.Time = n * usec
		}
	})
	if err == nil && !known {
		err = newMissingFileError(cpuStat)
	}

	return err
}

func (g *Group) readMemoryStat(d *Details) error {
	m, known := &d.Memory, false
	err := g.readTable(memoryStat, func(name []byte, n uint64) {
		switch string(name) {
		case "anon":
			m.RSS, known = n, true
		case "file":
			m.Cache = n
		case "kernel": // since Linux 5.18
			d.KernelMemory = ptr(n)
		case "file_mapped":
			m.MappedFile = n
		case "active_file":
			m.ActiveFile = n
		case "inactive_file":
			m.InactiveFile = n
		case "pgfault":
			m.Faults = n
		case "pgmajfault":
			m.MajorFaults = n
		}
	})
	if err == nil && !known {
		err = newMissingFileError(memoryStat)
	}

	m.WorkingSet = workingSet(m.Usage, m.InactiveFile)

	return err
}

// readIOStat reads lines like "8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0".
func (g *Group) readIOStat(d *Details) {
	b, err := g.readContent(ioStat)
	if err != nil {
		return
	}

	for len(b) > 0 {
		var line, field []byte
		line, b = cut(b, '\n')
		field, line = cut(line, ' ')
		if len(line) == 0 {
			continue // no I/O on this device
		}

		x := d.findDevice(field)
		for x != nil && len(line) > 0 {
			field, line = cut(line, ' ')
			name, value := cut(field, '=')
			n, _ := parse(value)
			switch string(name) {
			case "rbytes":
				x.ReadBytes = n
			case "wbytes":
				x.WriteBytes = n
			case "rios":
				x.Reads = n
			case "wios":
				x.Writes = n
			}
		}
	}
}
