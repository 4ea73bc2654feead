package systemd

import (
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"cri-dockerd/internal/model"
)

// infinity is systemd's value for no limit.
const infinity = math.MaxUint64

// numbers are the properties with one number, by the name of their file in the control group
// (systemd.resource-control(5)). All exist since systemd 240. The limits are systemd's.
var numbers = map[model.UnifiedKey]struct {
	name        string
	least, most uint64
}{
	"cpu.weight":      {"CPUWeight", 1, 10000},
	"io.weight":       {"IOWeight", 1, 10000},
	"memory.min":      {"MemoryMin", 0, infinity},
	"memory.low":      {"MemoryLow", 0, infinity},
	"memory.high":     {"MemoryHigh", 1, infinity},
	"memory.max":      {"MemoryMax", 1, infinity},
	"memory.swap.max": {"MemorySwapMax", 0, infinity},
	"pids.max":        {"TasksMax", 1, infinity},
}

// cpuSets are the properties with a set of CPUs or memory nodes, since systemd 244.
var cpuSets = map[model.UnifiedKey]string{
	"cpuset.cpus": "AllowedCPUs",
	"cpuset.mems": "AllowedMemoryNodes",
}

// Properties returns the properties for files of cgroup v2, sorted by the files' names. It omits
// files without a property and values that no property can express. A property may be less precise
// than its file, so the caller writes the file as well.
func Properties(files map[model.UnifiedKey]string) []Property {
	var out []Property
	for _, key := range slices.Sorted(maps.Keys(files)) {
		value := strings.TrimSpace(files[key])
		if number, ok := numbers[key]; ok {
			if n, ok := parseNumber(key, value); ok && n >= number.least && n <= number.most {
				out = append(out, Property{number.name, n})
			}
		}

		if name := cpuSets[key]; name != "" {
			if set, ok := parseSet(value); ok {
				out = append(out, Property{name, set})
			}
		}

		if key == "cpu.max" {
			out = append(out, quota(value)...)
		}
	}

	return out
}

// HasProperty reports whether a file has a property.
func HasProperty(key model.UnifiedKey) bool {
	return numbers[key].name != "" || cpuSets[key] != "" || key == "cpu.max"
}

// parseNumber parses the number of a file. io.weight may have lines for devices, which are files'
// alone.
func parseNumber(key model.UnifiedKey, value string) (uint64, bool) {
	if value == "max" {
		return infinity, !strings.HasSuffix(string(key), ".weight")
	}

	if key == "io.weight" {
		value, _, _ = strings.Cut(value, "\n")
		value = strings.TrimPrefix(value, "default ")
	}

	n, err := strconv.ParseUint(value, 10, 64)

	return n, err == nil
}

// maxCPU is the highest CPU of a set. The kernel's limit is 8191 (NR_CPUS on x86).
const maxCPU = 8191

// parseSet translates the kernel's list of CPUs or memory nodes, such as "0-3,8", into systemd's
// bits.
func parseSet(list string) ([]byte, bool) {
	var bits []byte
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			last = first
		}

		from, err := strconv.Atoi(first)
		to, err2 := strconv.Atoi(last)
		if err != nil || err2 != nil || from < 0 || to < from || to > maxCPU {
			return nil, false
		}

		for len(bits) <= to/8 {
			bits = append(bits, 0)
		}
		for i := from; i <= to; i++ {
			bits[i/8] |= 1 << (i % 8)
		}
	}

	return bits, true
}

const (
	second        = 1_000_000 // in microseconds
	defaultPeriod = 100_000   // of cpu.max, in microseconds
)

// quota translates cpu.max, "<quota or max> <period>" in microseconds.
func quota(value string) []Property {
	fields := strings.Fields(value)
	if len(fields) == 0 || len(fields) > 2 {
		return nil
	}

	period := uint64(defaultPeriod)
	if len(fields) == 2 {
		n, err := strconv.ParseUint(fields[1], 10, 32)
		if err != nil || n == 0 {
			return nil
		}
		period = n
	}

	perSecond := uint64(infinity)
	if fields[0] != "max" {
		n, err := strconv.ParseUint(fields[0], 10, 40)
		if err != nil || n == 0 {
			return nil
		}
		perSecond = n * second / period
	}

	return []Property{{"CPUQuotaPerSecUSec", perSecond}, {"CPUQuotaPeriodUSec", period}}
}
