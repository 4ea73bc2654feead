package finding

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"cri-dockerd/internal/shell"
)

// A service that responds late, or not at all on an overloaded node, is slow. Restarting it makes
// the node slower and may stop pods. A service counts as hung only if it does not respond for long
// on a node that has time for it.

// Above these values, a node is overloaded. A pressure of 60 % means that some process waited for
// the resource in 6 of the last 10 seconds.
const (
	maxPressure       = 60 // percent
	maxMemoryPressure = 20 // percent; processes wait for memory only while the node swaps or reclaims
	maxAverage        = 4  // running and blocked processes per CPU, for kernels without pressure
)

// overload describes the load of an overloaded node, "" for other nodes.
func (f *Facts) overload() string {
	l := f.Node.Load
	var high []string
	for _, p := range []struct {
		name           string
		percent, limit float64
	}{
		{"CPU", l.CPU, maxPressure},
		{"memory", l.Memory, maxMemoryPressure},
		{"I/O", l.IO, maxPressure},
	} {
		if p.percent > p.limit {
			high = append(high, fmt.Sprintf("%s pressure %.0f %%", p.name, p.percent))
		}
	}

	if len(high) == 0 && l.Average > maxAverage*float64(max(l.CPUs, 1)) {
		high = append(high, fmt.Sprintf("load average %.1f", l.Average))
	}
	if len(high) == 0 {
		return ""
	}

	return "the node is overloaded (" + strings.Join(high, ", ") + ")"
}

// findLoad is the fix for a slow service.
func findLoad() shell.Line {
	return shell.Advice("reduce the load (top, iostat and journalctl -n 50 show its cause), then run " +
		"cri-dockerd check again; no restart is required")
}

// slow returns the finding for a service that responded after the timeout.
func (f *Facts) slow(what string, took time.Duration) result {
	if load := f.overload(); load != "" {
		return warn(findLoad(), "%s responds slowly, after %s: %s", what, round(took), load)
	}
	return warn(findLoad(), "%s responds slowly, after %s", what, round(took))
}

// silent returns the finding for a service that did not respond. stopped is the ID of its stopped
// process, or 0. restart is the fix for a hung service.
func (f *Facts) silent(what string, waited time.Duration, stopped int, restart shell.Line) result {
	waiting := "no response within " + round(waited)
	if waited == 0 {
		waiting = "it accepts no connections"
	}

	switch load := f.overload(); {
	case stopped != 0:
		return fail(shell.Command("kill -CONT {}", strconv.Itoa(stopped)),
			"%s does not respond: process %d is stopped by a signal or a debugger", what, stopped)
	case load != "":
		return fail(findLoad(), "%s may hang or only be slow: %s, and %s", what, waiting, load)
	}

	return fail(restart, "%s hangs: %s", what, waiting)
}

func round(d time.Duration) string { return d.Round(100 * time.Millisecond).String() }
