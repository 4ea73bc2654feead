package chaos

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cri-dockerd/test/engines"
)

// Size of the tests. CI runs short seeds; make chaos runs long ones.
var (
	seeds     = flag.Uint64("seeds", 2, "seeds of TestChaos, one run each")
	firstSeed = flag.Uint64("first-seed", 1, "the first seed")
	minutes   = flag.Float64("minutes", 0.2, "duration of the faults in a run")
	podSlots  = flag.Int("pods", 5, "number of concurrent pods")
	keepLogs  = flag.String("keep-logs", "", "directory for the logs of failed runs")
)

// event is a fault in a schedule.
type event struct {
	at, lasts time.Duration
	fault     string
	choice    uint64 // seed for the choice of the target
}

// schedule creates the faults of one track.
func schedule(random *rand.Rand, faults map[string]breaker, horizon time.Duration) []event {
	names := slices.Sorted(maps.Keys(faults))
	var all []event
	for at := between(random, 2*time.Second, 4*time.Second); at < horizon; {
		e := event{
			at:     at,
			lasts:  between(random, time.Second/2, 6*time.Second),
			fault:  choose(random, names...),
			choice: random.Uint64(),
		}
		if random.IntN(8) == 0 {
			e.lasts *= 4 // longer than the timeouts of callers
		}

		e.lasts = min(e.lasts, horizon-at)
		all = append(all, e)
		at += e.lasts + between(random, time.Second/2, 4*time.Second)
	}

	return all
}

func between(random *rand.Rand, from, to time.Duration) time.Duration {
	return (from + time.Duration(random.Int64N(int64(to-from)))).Round(10 * time.Millisecond)
}

// trial is one seed on one engine.
type trial struct {
	*kubelet
	ctx         context.Context
	seed        uint64
	liveRestore bool
	began       time.Time
	tracks      [][]event

	losing sync.Mutex // guards the fields below
	blind  int        // current faults hiding the engine from the daemon
	sees   time.Time  // since when there is none
	losses []loss
	done   []string // actions, for the report of a failure
}

// TestChaos runs pods under a seeded schedule of faults. After the last fault, all pods must be
// running, the daemon's answers must match the engine, and every printed line must be in its log
// once. After the removal of the pods, nothing may remain.
func TestChaos(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			for seed := *firstSeed; seed < *firstSeed+*seeds; seed++ {
				t.Run(fmt.Sprint(seed), func(t *testing.T) { chaos(t, v, seed) })
			}
		})
	}
}

// chaos runs one seed.
func chaos(t *testing.T, v engines.Version, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	r := &trial{ctx: t.Context(), seed: seed, liveRestore: seed%3 != 2}
	horizon := time.Duration(*minutes * float64(time.Minute))
	r.tracks = [][]event{schedule(random, processFaults, horizon), schedule(random, surroundingFaults, horizon)}
	t.Cleanup(func() {
		if t.Failed() {
			r.report(t, v)
		}
	})

	var flags []string
	if !r.liveRestore {
		flags = []string{"--live-restore=false"}
	}

	r.kubelet = newKubelet(newLab(t, v, flags...), *podSlots, seed)
	t.Cleanup(func() { r.keepLogs(t, v) }) // before the cleanup of the engine
	baseline := r.warmUp(t)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	var working, supervising sync.WaitGroup
	working.Go(func() { r.drive(ctx) })
	downtime := rand.New(rand.NewPCG(seed, 1))
	supervising.Go(func() {
		r.supervise(ctx, func() time.Duration { return between(downtime, 100*time.Millisecond, 2*time.Second) })
	})
	supervising.Go(func() { r.audit(ctx) })
	supervising.Go(func() { r.collectGarbage(ctx) })
	r.inject(t)

	close(r.freeze)
	r.check(t, "settled", 4*time.Minute, r.checkSettled)
	close(r.deletion)
	if !waitFor(&working, 4*time.Minute) {
		t.Errorf("pods could not be removed within 4 minutes")
	}

	r.check(t, "no remains", 3*time.Minute, func(ctx context.Context) []string {
		now, err := r.remaining(ctx)
		if err != nil {
			return []string{err.Error()}
		}
		return append(now.minus(baseline), r.inFlight(t)...)
	})

	cancel()
	working.Wait()
	supervising.Wait()
	r.checkAll(t)
}

// check fails the test unless find returns no problems within d.
func (r *trial) check(t *testing.T, what string, d time.Duration, find func(context.Context) []string) {
	t.Helper()
	began := time.Now()
	problems := await(t.Context(), d, find)
	r.note("%s after %s", what, time.Since(began).Round(time.Millisecond))
	if len(problems) > 0 {
		t.Errorf("%s: not within %s:\n%s", what, d, strings.Join(problems, "\n"))
	}
}

// underWay finds calls in progress in the daemon's metrics.
var underWay = regexp.MustCompile(`(?m)^cri_dockerd_rpc_in_flight{method="(\w+)"} [1-9]`)

// inFlight returns the methods of calls still in progress after their callers have disconnected.
func (r *trial) inFlight(t *testing.T) (methods []string) {
	t.Helper()
	for _, m := range underWay.FindAllStringSubmatch(r.daemon.Metrics(t), -1) {
		methods = append(methods, "call in progress: "+m[1])
	}
	return methods
}

// checkAll checks the logs, and reports the violations seen during the run.
func (r *trial) checkAll(t *testing.T) {
	t.Helper()
	lines, forgotten := 0, r.forgotten()
	for _, p := range r.all() {
		n, problems := p.checkLogs(r.losses, forgotten)
		lines += n
		for _, problem := range problems {
			t.Error(problem)
		}
	}

	for _, v := range r.violations {
		t.Error(v)
	}

	r.reportLost(t)
	faults := len(r.tracks[0]) + len(r.tracks[1])
	t.Logf("seed %d, live-restore %v: %d faults, %d pods, %d lines of output, %d forgotten starts, %d calls, of "+
		"which %d failed; %s",
		r.seed, r.liveRestore, faults, len(r.ended), lines, len(forgotten), sum(r.ok)+sum(r.failed), sum(r.failed),
		r.done[len(r.done)-1])
}

func sum(counts map[string]int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

// waitFor waits for a group, and reports whether it finished in time.
func waitFor(g *sync.WaitGroup, d time.Duration) bool {
	done := make(chan struct{})
	go func() { g.Wait(); close(done) }()
	select {
	case <-done:
		return true
	case <-time.After(d):
		return false
	}
}

// warmUp takes one pod through its lifecycle and returns the resources shared by all pods.
func (r *trial) warmUp(t *testing.T) remains {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	p := newPod(r.kubelet, 99, 0, rand.New(rand.NewPCG(r.seed, 2)))
	problems := await(ctx, time.Minute, func(ctx context.Context) []string {
		if err := p.sync(ctx); err != nil || r.ok["StartContainer"] == 0 {
			return []string{fmt.Sprint("no container has started: ", err)}
		}
		return nil
	})
	if len(problems) > 0 {
		t.Fatalf("the first pod: %q", problems)
	}

	p.end(ctx)
	r.ended = append(r.ended, p)

	var baseline remains
	problems = await(ctx, time.Minute, func(ctx context.Context) []string {
		var err error
		if baseline, err = r.remaining(ctx); err != nil {
			return []string{err.Error()}
		}
		return slices.Concat(baseline["containers"], baseline["veths"], baseline["pins"], baseline["reservations"],
			baseline["control groups"])
	})
	if len(problems) > 0 {
		t.Fatalf("remains of the first pod: %q", problems)
	}

	return baseline
}

// inject runs the schedule.
func (r *trial) inject(t *testing.T) {
	t.Helper()
	r.began = time.Now()
	var tracks sync.WaitGroup
	for i, faults := range []map[string]breaker{processFaults, surroundingFaults} {
		tracks.Go(func() {
			for _, e := range r.tracks[i] {
				if !sleep(r.ctx, time.Until(r.began.Add(e.at))) {
					return
				}
				r.apply(e, faults[e.fault])
			}
		})
	}

	tracks.Wait()
	r.note("all faults have ended")
}

// apply injects one fault for its duration.
func (r *trial) apply(e event, fault breaker) {
	random := rand.New(rand.NewPCG(e.choice, 0))
	if slices.Contains(blinding, e.fault) {
		r.countBlinding(1)
		defer r.countBlinding(-1)
	}

	end, err := fault(r, random)
	r.note("%s: %v", e.fault, err)
	if end == nil {
		return
	}

	sleep(r.ctx, e.lasts)
	end()
	r.note("end of %s", e.fault)
}

// countBlinding counts the current faults that may hide the engine from the daemon.
func (r *trial) countBlinding(n int) {
	r.losing.Lock()
	defer r.losing.Unlock()
	r.blind += n
	r.sees = time.Now()
}

// lose records a permitted loss.
func (r *trial) lose(l loss) {
	r.losing.Lock()
	defer r.losing.Unlock()
	r.losses = append(r.losses, l)
}

// note records an action.
func (r *trial) note(format string, args ...any) {
	r.losing.Lock()
	defer r.losing.Unlock()
	r.done = append(r.done, fmt.Sprintf("%7.2fs %s", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...)))
}

// keepLogs copies the logs of a failed run to the directory in -keep-logs.
func (r *trial) keepLogs(t *testing.T, v engines.Version) {
	t.Helper()
	if !t.Failed() || *keepLogs == "" {
		return
	}

	dir := filepath.Join(*keepLogs, fmt.Sprintf("%s-seed%d-%d", v, r.seed, time.Now().Unix()))
	err := os.CopyFS(filepath.Join(dir, "pods"), os.DirFS(r.eng.Path(r.logs)))
	for name, file := range map[string]string{
		"docker.log":     filepath.Join(r.eng.Dir, "docker.log"),
		"daemon.log":     r.daemon.Log(),
		"log-driver.log": filepath.Join(r.eng.Dir, "run/log-driver/log"),
	} {
		b, readErr := os.ReadFile(file)
		err = errors.Join(err, readErr, os.WriteFile(filepath.Join(dir, name), b, 0o644))
	}

	t.Logf("logs are in %s (%v)", dir, err)
}

// report logs the details of a failure: the command to repeat the run, its schedule, all actions,
// and all failed calls.
func (r *trial) report(t *testing.T, v engines.Version) {
	t.Helper()
	t.Logf("repeat with: make chaos ENGINE=%s SEEDS=1 FIRST_SEED=%d MINUTES=%g PODS=%d", v, r.seed, *minutes, *podSlots)
	for i, track := range r.tracks {
		for _, e := range track {
			t.Logf("schedule %d: %7.2fs for %5.2fs: %s", i, e.at.Seconds(), e.lasts.Seconds(), e.fault)
		}
	}

	t.Logf("began at %s:\n%s", r.began.Format(time.StampMilli), strings.Join(r.done, "\n"))
	if r.kubelet == nil {
		return
	}

	for _, text := range slices.Sorted(maps.Keys(r.errors)) {
		t.Logf("%5d × %s", r.errors[text], text)
	}
}
