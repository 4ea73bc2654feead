package probe

import (
	"runtime"
	"strconv"
	"strings"

	"cri-dockerd/internal/check/finding"
)

// load returns the load of the node.
func (p *Prober) load() finding.Load {
	return finding.Load{
		CPUs:    runtime.NumCPU(),
		Average: firstNumber(p.kernel("/proc/loadavg"), ""),
		CPU:     firstNumber(p.kernel("/proc/pressure/cpu"), "some avg10="),
		Memory:  firstNumber(p.kernel("/proc/pressure/memory"), "some avg10="),
		IO:      firstNumber(p.kernel("/proc/pressure/io"), "some avg10="),
	}
}

// firstNumber returns the number after a prefix of a kernel file, or 0: "0.52 0.58 0.59 3/800 17"
// in proc_loadavg(5), "some avg10=1.25 avg60=…" in Documentation/accounting/psi.rst.
func firstNumber(content, prefix string) float64 {
	rest, found := strings.CutPrefix(content, prefix)
	if !found {
		return 0
	}

	word, _, _ := strings.Cut(rest, " ")
	n, err := strconv.ParseFloat(word, 64)
	if err != nil || !(n >= 0 && n < 1e6) {
		return 0
	}

	return n
}
