package main

import (
	"fmt"
	"io"
	"slices"
	"time"
)

// The limits of a release.
const (
	listLimit   = time.Millisecond
	statusLimit = 300 * time.Microsecond
	// RunPodSandbox as a multiple of create and start in host mode.
	ownTimes = 1.15
	// RunPodSandbox in engine mode above create, start and CNI ADD.
	aboveFloor = 5 * time.Millisecond
	// StopPodSandbox above the longer of the engine's stop and CNI DEL.
	aboveDown = 15 * time.Millisecond
	rssLimit  = 35 << 20 // bytes
)

// report prints the results as a Markdown table and reports whether all limits hold.
func report(out io.Writer, f results, rss int64) bool {
	ok := true
	verdict := func(good bool) string {
		ok = ok && good
		if good {
			return "pass"
		}
		return "FAIL"
	}

	fmt.Fprintf(out, "| %-40s | %9s | %9s | %5s | %-22s | %-7s |\n", "operation", "p50", "p99", "n", "limit", "verdict")
	fmt.Fprintln(out, "|---|---:|---:|---:|---|---|")
	row := func(op operation, limit time.Duration) {
		s := f.Samples[op]
		p50, p99 := quantile(s, 50), quantile(s, 99)
		limitText, v := "", ""
		if limit > 0 {
			limitText, v = "p50 ≤ "+ms(limit), verdict(p50 <= limit)
		}
		fmt.Fprintf(out, "| %-40s | %9s | %9s | %5d | %-22s | %-7s |\n", op, ms(p50), ms(p99), len(s), limitText, v)
	}

	row(listSandboxes, listLimit)
	row(listContainers, listLimit)
	row(sandboxStatus, statusLimit)
	row(containerStatus, statusLimit)
	row(floorCall, 0)
	row(engineList, 0)
	above := func(name string, op, floor operation, limit time.Duration) {
		d := differences(f.Samples[op], f.Samples[floor])
		p50 := quantile(d, 50)
		fmt.Fprintf(out, "| %-40s | %9s | %9s | %5d | %-22s | %-7s |\n", name, ms(p50), ms(quantile(d, 99)), len(d),
			"p50 ≤ "+ms(limit), verdict(p50 <= limit))
	}

	ratio := func(a, b operation) float64 {
		return float64(quantile(f.Samples[a], 50)) / float64(quantile(f.Samples[b], 50))
	}
	row(runSandbox, 0)
	row(floorHost, 0)
	own := ratio(runSandbox, floorHost)
	fmt.Fprintf(out, "| %-40s | %9.3f | %9s | %5s | %-22s | %-7s |\n", "RunPodSandbox as a multiple of it", own, "", "",
		fmt.Sprintf("≤ %.2f", ownTimes), verdict(own <= ownTimes))
	for _, op := range []operation{floorSandbox, floorCreate, floorStart, floorAdd, stopSandbox, floorStop, floorDel} {
		row(op, 0)
	}

	above("StopPodSandbox above the longer", stopSandbox, floorDown, aboveDown)
	row(removeSandbox, 0)
	for _, op := range []operation{runSandbox, floorSandbox} {
		row(inEngineMode(op), 0)
	}

	above("RunPodSandbox above it", inEngineMode(runSandbox), inEngineMode(floorSandbox), aboveFloor)
	row(inEngineMode(stopSandbox), 0)
	above("StopPodSandbox above the longer (engine)", inEngineMode(stopSandbox), inEngineMode(floorDown), aboveDown)
	fmt.Fprintf(out, "| %-40s | %5.1f MiB | %9s | %5s | %-22s | %-7s |\n", "memory of the daemon (RSS)",
		float64(rss)/(1<<20), "", "", fmt.Sprintf("≤ %d MiB", rssLimit>>20), verdict(rss <= rssLimit))
	fmt.Fprintf(out, "\nRunPodSandbox takes %.3f times the sum of create, start and CNI ADD, and %.3f times in "+
		"engine mode. PodSandboxStatus takes %.1f times an empty call. ListContainers takes %.1f times an empty "+
		"call, and 1/%.0f of the engine's own list.\n",
		ratio(runSandbox, floorSandbox), ratio(inEngineMode(runSandbox), inEngineMode(floorSandbox)),
		ratio(sandboxStatus, floorCall), ratio(listContainers, floorCall), ratio(engineList, listContainers))

	return ok
}

// quantile returns the q-th percentile by the nearest rank.
func quantile(d []time.Duration, q int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(d))
	return s[max(0, (len(s)*q+99)/100-1)]
}

// differences returns a − b, sample by sample. Both samples of a pair are taken within a second,
// which cancels machine noise.
func differences(a, b []time.Duration) []time.Duration {
	out := make([]time.Duration, min(len(a), len(b)))
	for i := range out {
		out[i] = a[i] - b[i]
	}
	return out
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond)) }
