package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// loadCommand runs the program as the load test with very many pods.
const loadCommand = "load"

// The limits of the load test.
const (
	fewPods            = 100      // baseline for the latency at the full number
	burstPods          = 50       // started at once
	loadTimes          = 2.0      // latency at the full number as a multiple of that at fewPods
	loadRSS            = 60 << 20 // bytes
	settleSeconds      = 60
	settledPercent     = 85 // idle
	idleField          = 3  // idle time in a line of /proc/stat
	firstResponseLimit = 100 * time.Millisecond
	fullViewLimit      = time.Second
)

// loadBench is a running load test.
type loadBench struct {
	h         *harness
	engine    *engines.Engine
	daemon    *engines.Daemon
	docker    *client.Client
	image     string
	callCount int
	pods      []loadedPod
	table     loadTable
}

// loadedPod is a running pod with one container.
type loadedPod struct {
	config             *runtimeapi.PodSandboxConfig
	sandbox, container string
}

// loadTable collects the results.
type loadTable struct {
	rows   [][4]string // name, measured, limit, verdict
	failed bool
}

func (t *loadTable) add(name, measured, limit string, ok bool) {
	verdict := ""
	if limit != "" {
		verdict = "pass"
	}
	if !ok {
		verdict, t.failed = "FAIL", true
	}

	t.rows = append(t.rows, [4]string{name, measured, limit, verdict})
}

func (t *loadTable) print(out io.Writer) {
	fmt.Fprintln(out, "| load | measured | limit | verdict |\n|---|---:|---|---|")
	for _, r := range t.rows {
		fmt.Fprintf(out, "| %s | %s | %s | %s |\n", r[0], r[1], r[2], r[3])
	}
	fmt.Fprintln(out)
}

// benchLoad does one run for each engine and reports whether all limits hold.
func benchLoad(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(loadCommand, flag.ExitOnError)
	pods := flags.Int("pods", 250, "pods with one container each")
	calls := flags.Int("calls", 300, "calls of each list and status")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	ok := true
	for _, v := range engines.Versions() {
		load := loadAverage(h)
		t := drill(ctx, h, v, *pods, *calls)
		fmt.Printf("Docker Engine %s, %d pods with one container each, %d CPUs, load average %s before the run, %s\n\n",
			v, *pods, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))
		t.print(os.Stdout)
		ok = ok && !t.failed
	}

	return ok
}

// drill loads its own node in every way. At the end it verifies that nothing remains.
func drill(ctx context.Context, h *harness, v engines.Version, pods, calls int) *loadTable {
	e := engines.Start(h, v)
	l := &loadBench{
		h:         h,
		engine:    e,
		image:     e.ImportBusybox(h),
		daemon:    e.Daemon(h, "--log-level=info"),
		docker:    e.Docker(h),
		callCount: calls,
	}

	must := func(name string, err error) {
		if err != nil {
			h.Fatalf("bench: %s: %v", name, err)
		}
	}

	must("burst", l.burst(ctx))
	must("fill", l.fill(ctx, min(pods, fewPods)))
	few := l.measureLatency(ctx)
	must("fill", l.fill(ctx, pods))
	l.compare(few, l.measureLatency(ctx))
	l.reportRSS("memory of the daemon (RSS)")
	l.measureRestarts(ctx, v)
	for _, d := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"exec probes", l.runProbes},
		{"log followers", l.runFollowers},
		{"a client without reads", l.runStalledClient},
		{"a slow event reader", l.runSlowReader},
	} {
		h.Logf("bench: %s", d.name)
		must(d.name, d.do(ctx))
	}

	l.reportRSS("memory of the daemon (RSS) after the drills")
	must("removal", l.removeAll(ctx))

	return &l.table
}

// burst starts the first pods all at once.
func (l *loadBench) burst(ctx context.Context) error {
	begin := time.Now()
	if err := l.start(ctx, burstPods, burstPods); err != nil {
		return err
	}
	l.table.add(fmt.Sprintf("%d pods started at once", burstPods), time.Since(begin).Round(time.Millisecond).String(),
		"all run", true)
	return nil
}

// fill starts pods up to the given number.
func (l *loadBench) fill(ctx context.Context, pods int) error {
	l.h.Logf("bench: starting up to %d pods", pods)
	return l.start(ctx, pods-len(l.pods), 4)
}

func (l *loadBench) start(ctx context.Context, count, atOnce int) error {
	if count <= 0 {
		return nil
	}

	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	first := len(l.pods)
	l.pods = append(l.pods, make([]loadedPod, count)...)
	for i := range count {
		g.Go(func() (err error) {
			l.pods[first+i], err = l.pod(ctx, fmt.Sprintf("pod-%d", first+i), []string{"sleep", "100000"})
			return err
		})
	}

	return g.Wait()
}

// pod starts one pod like a kubelet.
func (l *loadBench) pod(ctx context.Context, name string, command []string) (p loadedPod, err error) {
	p.config = podConfig(name)
	p.config.Linux.CgroupParent = l.engine.CgroupParent + "/kubepods/burstable/pod" + p.config.Metadata.Uid
	p.config.LogDirectory = filepath.Join(l.engine.Dir, "pods", p.config.Metadata.Uid)
	sandbox, err := l.daemon.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		return p, err
	}

	p.sandbox = sandbox.PodSandboxId
	p.container, err = l.container(ctx, p, "main", command)

	return p, err
}

func (l *loadBench) container(ctx context.Context, p loadedPod, name string, command []string) (string, error) {
	c, err := l.daemon.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  p.sandbox,
		SandboxConfig: p.config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: name},
			Image:    &runtimeapi.ImageSpec{Image: l.image},
			Command:  command,
			Labels:   p.config.Labels,
			LogPath:  name + ".log",
		},
	})
	if err != nil {
		return "", err
	}

	_, err = l.daemon.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})

	return c.ContainerId, err
}

// measureLatency measures lists and statuses on an idle engine. Starts keep the engine busy for
// some time.
func (l *loadBench) measureLatency(ctx context.Context) map[operation][]time.Duration {
	l.settle(ctx)
	m := &measurement{
		options: options{Pods: len(l.pods)},
		runtime: l.daemon.Runtime,
		results: results{Samples: map[operation][]time.Duration{}},
		sandbox: l.pods[0].sandbox,
		running: l.pods[0].container,
	}

	calls := m.relist(ctx)
	for i := range l.callCount + warmUp {
		if i == warmUp {
			clear(m.results.Samples)
		}
		if err := m.measureEach(calls); err != nil {
			l.h.Fatalf("bench: %v", err)
		}
	}

	return m.results.Samples
}

// settle waits until the machine is mostly idle, for at most a minute.
func (l *loadBench) settle(ctx context.Context) {
	for range settleSeconds {
		idle, total := processorTime(l.h)
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}

		idleAfter, totalAfter := processorTime(l.h)
		if (idleAfter-idle)*100 >= settledPercent*(totalAfter-total) {
			return
		}
	}

	l.h.Logf("bench: the machine is still busy")
}

// processorTime returns the idle and the total time of all processors in ticks (proc_stat(5)).
func processorTime(h *harness) (idle, total uint64) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		h.Fatalf("bench: %v", err)
	}

	first, _, _ := strings.Cut(string(b), "\n")
	for i, field := range strings.Fields(first)[1:] {
		ticks, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			h.Fatalf("bench: /proc/stat: %v", err)
		}

		total += ticks
		if i == idleField || i == idleField+1 { // idle and iowait
			idle += ticks
		}
	}

	return idle, total
}

// compare reports the latency with all pods beside that with few.
func (l *loadBench) compare(few, all map[operation][]time.Duration) {
	for _, op := range []operation{listSandboxes, listContainers, sandboxStatus, containerStatus} {
		a, b := quantile(few[op], 50), quantile(all[op], 50)
		ratio := float64(b) / float64(a)
		l.table.add(string(op)+", p50",
			fmt.Sprintf("%s, %.2f × that of %d pods", ms(b), ratio, min(fewPods, len(l.pods))),
			fmt.Sprintf("≤ %.0f ×", loadTimes), ratio <= loadTimes)
	}
}

func (l *loadBench) reportRSS(name string) {
	rss := l.daemon.RSS(l.h)
	l.table.add(name, fmt.Sprintf("%.1f MiB", float64(rss)/(1<<20)), fmt.Sprintf("≤ %d MiB", loadRSS>>20),
		rss <= loadRSS)
}

// measureRestarts kills and restarts the daemon several times.
func (l *loadBench) measureRestarts(ctx context.Context, v engines.Version) {
	var first, full []time.Duration
	for range 5 {
		l.daemon.Kill(l.h)
		begin := time.Now()
		l.daemon.Start(l.h)
		l.awaitSocket(begin)
		d := engines.Connect(l.h, "unix://"+l.daemon.Socket)
		if _, err := d.Runtime.Version(ctx, &runtimeapi.VersionRequest{}); err != nil {
			l.h.Fatalf("bench: Version after a restart: %v", err)
		}

		first = append(first, time.Since(begin))
		r, err := d.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		if err = checkCount(len(r.GetItems()), len(l.pods), err); err != nil {
			l.h.Fatalf("bench: ListPodSandbox after a restart: %v", err)
		}

		full = append(full, time.Since(begin))
	}

	l.daemon.AwaitReady(l.h)
	a, b := quantile(first, 50), quantile(full, 50)
	l.table.add("restart: first response, p50", ms(a), "≤ "+ms(firstResponseLimit), a <= firstResponseLimit)
	limit := ""
	if v == engines.V20 {
		limit = "≤ " + ms(fullViewLimit)
	}

	l.table.add("restart: full view, p50", ms(b), limit, limit == "" || b <= fullViewLimit)
}

// awaitSocket waits until the socket has a listener. A gRPC client waits a second after a failed
// attempt.
func (l *loadBench) awaitSocket(begin time.Time) {
	for {
		c, err := net.Dial("unix", l.daemon.Socket)
		if err == nil {
			c.Close()
			return
		}

		if time.Since(begin) > time.Minute {
			l.h.Fatalf("bench: the daemon is not listening: %v", err)
		}

		time.Sleep(time.Millisecond)
	}
}

// removeAll removes all pods and reports remaining resources.
func (l *loadBench) removeAll(ctx context.Context) error {
	g, groupCtx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	begin := time.Now()
	for _, p := range l.pods {
		g.Go(func() error {
			_, err := l.daemon.Runtime.RemovePodSandbox(groupCtx,
				&runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
			return err
		})
	}

	if err := g.Wait(); err != nil {
		return err
	}

	took := time.Since(begin)

	remaining, err := l.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
	files := 0
	for _, pattern := range []string{filepath.Join(l.daemon.LeaseDir, "*", "10.*"),
		filepath.Join(l.daemon.CacheDir, "*"), filepath.Join(l.daemon.PinDir, "*")} {
		found, globErr := filepath.Glob(pattern)
		err = errors.Join(err, globErr)
		files += len(found)
	}

	l.table.add("all pods removed", took.Round(time.Millisecond).String(), "", true)
	total := len(remaining.Items) + files
	l.table.add("remaining: containers, leases, cached results, namespaces", fmt.Sprint(total), "0", total == 0)

	return err
}
