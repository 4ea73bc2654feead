package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"cri-dockerd/test/engines"
)

// nriCommand runs the program as the benchmark of NRI without plugins.
const nriCommand = "nri"

// nriShare limits the three calls of a pod's start with NRI on and no plugin, as a multiple of the
// calls with NRI off.
const nriShare = 1.01

// nriSettle is the time before each pod in which the engine ends its work on the pod before.
const nriSettle = 200 * time.Millisecond

// The compared daemons. The second one with NRI off gives the noise of the run, and half of the
// floor.
const (
	nriOff   = "off"
	nriFloor = "off again"
	nriOn    = "on"
)

// nriBench compares daemons on one engine. They take turns, pod by pod.
type nriBench struct {
	h       *harness
	e       *engines.Engine
	image   string
	names   []string
	daemons map[string]*engines.Daemon
}

// benchNRI does one run for each engine with the containerd shim. It reports whether NRI without
// plugins stays within its limit, and NRI that is off costs no allocation.
func benchNRI(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(nriCommand, flag.ExitOnError)
	rounds := flags.Int("rounds", 100, "rounds of a pod with each daemon")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	ok := benchNRIOff(ctx, h)
	for _, v := range engines.ShimVersions() {
		load := loadAverage(h)
		b := newNRIBench(h, v)
		fmt.Printf("Docker Engine %s, %d rounds of a pod with each daemon, %d CPUs, load average %s before the run, "+
			"%s\n\n", v, *rounds, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))
		ok = reportNRI(b.run(ctx, *rounds)) && ok
	}

	return ok
}

// benchNRIOff prints what the start of a pod executes for NRI while it is off.
func benchNRIOff(ctx context.Context, h *harness) bool {
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", "-run", "^TestPluginsOffCost$",
		"cri-dockerd/internal/cri")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()

	var line string
	for l := range strings.Lines(string(out)) {
		if _, after, found := strings.Cut(l, "NRI off: "); found {
			line = after
		}
	}
	if line == "" {
		h.Fatalf("bench: go test: %v\n%s", err, out)
	}
	fmt.Printf("NRI off: %s\n", line)

	return err == nil
}

// newNRIBench starts an engine and the daemons. Each has directories of its own: they know nothing
// of the others' pods but their containers.
func newNRIBench(h *harness, v engines.Version) *nriBench {
	e := engines.Start(h, v)
	b := &nriBench{
		h:       h,
		e:       e,
		image:   e.ImportBusybox(h),
		names:   []string{nriOff, nriFloor, nriOn},
		daemons: map[string]*engines.Daemon{},
	}
	for i, name := range b.names {
		dir := fmt.Sprintf("/run/nri-bench-%d", i) // a tmpfs of the engine, as on a node
		args := []string{"--log-level=info", "--container-log=json-file", "--run-directory=" + dir}
		if name == nriOn {
			args = append(args, "--nri-socket="+dir+"/nri.sock", "--nri-plugin-dir="+dir+"/plugins",
				"--nri-config-dir="+dir+"/conf")
		}

		b.daemons[name] = e.Daemon(h, args...)
		b.daemons[name].AwaitReady(h)
	}

	return b
}

// callTimes are the times of a call in each round, by call.
type callTimes map[operation][]time.Duration

// run returns the times by daemon. The order in a round is random: the engine may still remove the
// pod before.
func (b *nriBench) run(ctx context.Context, rounds int) map[string]callTimes {
	times := map[string]callTimes{}
	for _, name := range b.names {
		times[name] = callTimes{}
	}

	r := rand.New(rand.NewPCG(1, 1)) //nolint:gosec // the same order in each run
	for i := range rounds + warmUp {
		for j, k := range r.Perm(len(b.names)) {
			name := b.names[k]
			pod := fmt.Sprintf("nri-%d-%d", i, j)
			cfg := podConfig(pod)
			cfg.Linux.CgroupParent = b.e.CgroupParent + "/" + pod

			time.Sleep(nriSettle)
			took, err := timePod(ctx, b.daemons[name].Runtime, b.image, cfg)
			if err != nil {
				b.h.Fatalf("bench: pod %s with NRI %s: %v", pod, name, err)
			}
			for op, d := range took {
				if i >= warmUp {
					times[name][op] = append(times[name][op], d)
				}
			}
		}
	}

	return times
}

// reportNRI prints the differences of each round, and reports whether the median of those between
// NRI on and both with NRI off is within the limit.
func reportNRI(times map[string]callTimes) bool {
	fmt.Println("| call, NRI | p50 | difference, p50 | 95 % interval | of the call |")
	fmt.Println("|---|---:|---:|---:|---:|")

	var ratio float64
	for _, op := range []operation{"RunPodSandbox", "CreateContainer", "StartContainer", threeCalls} {
		off, again := times[nriOff][op], times[nriFloor][op]
		floor := quantile(slices.Concat(off, again), 50)
		fmt.Printf("| %s, %s | %s | | | |\n", op, nriOff, ms(quantile(off, 50)))
		for _, one := range []struct {
			name   string
			series [][]time.Duration
		}{
			{nriFloor, [][]time.Duration{differences(again, off)}},
			{nriOn, [][]time.Duration{differences(times[nriOn][op], off), differences(times[nriOn][op], again)}},
		} {
			middle := quantile(slices.Concat(one.series...), 50)
			low, high := bootstrap(one.series...)
			ratio = 1 + middle.Seconds()/floor.Seconds() // the last one counts
			fmt.Printf("| %s, %s | %s | %s | %s to %s | %+.2f %% |\n", op, one.name,
				ms(quantile(times[one.name][op], 50)), ms(middle), ms(low), ms(high), 100*ratio-100)
		}
	}

	verdict := "PASS"
	if ratio > nriShare {
		verdict = "FAIL"
	}
	fmt.Printf("\nNRI on without a plugin: %.4f times the three calls, limit %.2f: %s\n\n", ratio, nriShare, verdict)

	return ratio <= nriShare
}

// bootstrap returns the 95 % interval of the median of all series, from medians of resampled
// rounds. Element i of each series belongs to round i.
func bootstrap(series ...[]time.Duration) (low, high time.Duration) {
	const resamples = 2000
	r := rand.New(rand.NewPCG(1, 1)) //nolint:gosec // the same samples give the same interval
	medians := make([]time.Duration, resamples)
	var sample []time.Duration
	for i := range medians {
		sample = sample[:0]
		for range series[0] {
			round := r.IntN(len(series[0]))
			for _, s := range series {
				sample = append(sample, s[round])
			}
		}
		medians[i] = quantile(sample, 50)
	}
	slices.Sort(medians)

	return medians[resamples*25/1000], medians[resamples*975/1000]
}
