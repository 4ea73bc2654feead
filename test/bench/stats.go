package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// statsCommand runs the program as the benchmark of figures.
const statsCommand = "stats"

// The limits of the issue that brought them.
const (
	containerStatsLimit = 5 * time.Millisecond
	podStatsLimit       = 10 * time.Millisecond
	podMetricsLimit     = 20 * time.Millisecond
	pollingLimit        = 2 * time.Millisecond // of CPU a second, while a kubelet asks
	idleLimit           = time.Millisecond     // of CPU a second: 0.1 %
	statsRSSLimit       = 35 << 20             // bytes
	// bytes: some heartbeats; one request for each call would be 100 times as much
	askedLimit = 1 << 10
)

const (
	containerStats operation = "ListContainerStats"
	podStats       operation = "ListPodSandboxStats"
	podMetrics     operation = "ListPodSandboxMetrics"
	streamMetrics  operation = "StreamPodSandboxMetrics"
	metricsPage    operation = "/metrics of the daemon"
	engineStats    operation = "engine: stats of one container"
)

// settled is how long a kubelet asks before it counts: layers that do not change are measured
// twice, ten seconds apart.
const settled = 25 * time.Second

// statsFigures are what was measured beside the times.
type statsFigures struct {
	figures
	asked         int64         // bytes sent to the engine during the calls, beyond the heartbeat's
	idle          time.Duration // CPU a second
	polling       time.Duration // the same while a kubelet asks for lists and containers
	pollingPods   time.Duration // the same with PodAndContainerStatsFromCRI
	rss           int64         // after all of it, bytes
	rssBefore     int64
	metrics, size int // of one answer
}

// benchStats does one run and says whether all limits hold.
func benchStats(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(statsCommand, flag.ExitOnError)
	pods := flags.Int("pods", 100, "pods that run meanwhile, with one container each")
	calls := flags.Int("calls", 200, "calls of each kind")
	over := flags.Duration("over", 30*time.Second, "how long the daemon is watched while nobody asks, and while a "+
		"kubelet would")
	version := flags.String("engine", string(engines.V20), "engine: 20.10 or 29")
	hurry := flags.Bool("hurry", false, "measure with precedence over all other processes, for the figures of a "+
		"quiet machine on a busy one")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	loads, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		h.Fatalf("bench: %v", err)
	}

	load, _, _ := strings.Cut(string(loads), " ")
	e := engines.Start(h, engines.Version(*version))
	c := e.Counted(h)
	d := e.Daemon(h, "--log-level=info", "--docker-endpoint=unix://"+c.Socket)
	m := &measuring{
		options: options{
			Pods:    *pods,
			Calls:   *calls,
			Docker:  "unix://" + e.Socket,
			Parent:  e.CgroupParent,
			Scratch: e.Dir,
		},
		runtime: d.Runtime,
		docker:  e.Docker(h),
		figures: figures{Samples: map[operation][]time.Duration{}},
	}

	f := statsFigures{}
	for _, part := range []func(context.Context) error{m.prepare, m.fill} {
		if err := part(ctx); err != nil {
			h.Fatalf("bench: %v", err)
		}
	}

	if *hurry {
		d.Hurry(h)
		if out, err := exec.Command("chrt", "-a", "-r", "-p", "1", strconv.Itoa(os.Getpid())).CombinedOutput(); err !=
			nil {
			h.Fatalf("bench: chrt: %v, %s", err, out)
		}
	}

	f.rssBefore = d.RSS(h)
	idleFrom, idleSent := time.Now(), c.Sent()
	f.idle = perSecond(ctx, h, d, *over, func(int) error { return nil })
	heartbeat := float64(c.Sent()-idleSent) / time.Since(idleFrom).Seconds()
	for _, part := range []struct {
		cpu     *time.Duration
		over    time.Duration
		fromCRI bool
	}{
		// opens what stays open, and what does not change is measured
		{new(time.Duration), settled, true},
		{&f.polling, *over, false},
		{&f.pollingPods, *over, true},
	} {
		*part.cpu = perSecond(ctx, h, d, part.over, func(second int) error {
			return m.asKubelet(ctx, second, part.fromCRI)
		})
	}

	from, before := time.Now(), c.Sent()
	if err := m.askFigures(ctx, h, d, &f); err != nil {
		h.Fatalf("bench: %v", err)
	}

	f.asked = max(0, c.Sent()-before-int64(heartbeat*time.Since(from).Seconds()))
	f.rss, f.figures = d.RSS(h), m.figures
	fmt.Printf("Docker Engine %s, %d pods with one container each, %d CPUs, load average %s before the run, %s\n\n",
		m.figures.Engine, *pods, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))

	return reportStats(os.Stdout, f)
}

// perSecond is the CPU that the daemon takes in a second while something is done every second.
func perSecond(
	ctx context.Context, h *harness, d *engines.Daemon, over time.Duration, do func(second int) error,
) time.Duration {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()

	begun, cpu := time.Now(), d.CPU(h)
	for second := 0; time.Since(begun) < over; second++ {
		select {
		case <-ctx.Done():
			h.Fatalf("bench: %v", ctx.Err())
		case <-tick.C:
		}

		if err := do(second); err != nil {
			h.Fatalf("bench: %v", err)
		}
	}

	return time.Duration(float64(d.CPU(h)-cpu) / time.Since(begun).Seconds())
}

// asKubelet asks what a kubelet does in a second: lists each time, and every ten seconds figures,
// of containers or, with PodAndContainerStatsFromCRI, of pods.
func (m *measuring) asKubelet(ctx context.Context, second int, fromCRI bool) error {
	_, err := m.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	_, err2 := m.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err = errors.Join(err, err2); err != nil || second%10 != 0 {
		return err
	}

	if fromCRI {
		_, err = m.runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
	} else {
		_, err = m.runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
	}

	return err
}

// askFigures measures the calls in turn, and then some of the engine's own.
func (m *measuring) askFigures(ctx context.Context, h *harness, d *engines.Daemon, f *statsFigures) error {
	asks := []ask{
		m.version(ctx),
		{containerStats, func() error {
			r, err := m.runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
			return enough(len(r.GetStats()), m.Pods, err)
		}},
		{podStats, func() error {
			r, err := m.runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
			return enough(len(r.GetStats()), m.Pods, err)
		}},
		{podMetrics, func() error {
			r, err := m.runtime.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
			return enough(len(r.GetPodMetrics()), m.Pods, err)
		}},
		{streamMetrics, func() error { return m.stream(ctx) }},
		{metricsPage, func() error {
			return enough(strings.Count(d.Metrics(h), "container_memory_rss{"), m.Pods, nil)
		}},
	}

	for i := range m.Calls + warmUp {
		if i == warmUp {
			clear(m.figures.Samples)
		}
		if err := m.inTurn(asks); err != nil {
			return err
		}
	}

	r, err := m.runtime.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		return err
	}

	f.metrics, f.size = 0, 0
	for _, p := range r.PodMetrics {
		f.metrics += len(p.Metrics)
		for _, c := range p.ContainerMetrics {
			f.metrics += len(c.Metrics)
		}
	}

	f.size = proto.Size(r)
	for range 5 { // for comparison; it is slow
		if err := m.timed(engineStats, func() error {
			s, err := m.docker.ContainerStats(ctx, m.running, client.ContainerStatsOptions{})
			if err != nil {
				return err
			}
			defer s.Body.Close()
			_, err = io.Copy(io.Discard, s.Body)
			return err
		}); err != nil {
			return err
		}
	}

	return nil
}

func (m *measuring) stream(ctx context.Context) error {
	s, err := m.runtime.StreamPodSandboxMetrics(ctx, &runtimeapi.StreamPodSandboxMetricsRequest{})
	if err != nil {
		return err
	}

	for n := 0; ; {
		page, err := s.Recv()
		if err == io.EOF { //nolint:errorlint // as gRPC says it
			return enough(n, m.Pods, nil)
		} else if err != nil {
			return err
		}
		n += len(page.PodSandboxMetrics)
	}
}

// reportStats prints the figures as a Markdown table and says whether all limits hold.
func reportStats(out io.Writer, f statsFigures) bool {
	ok := true
	row := func(what, figure, p99, n, limit string, good bool) {
		v := ""
		if limit != "" {
			v = "pass"
			if !good {
				v, ok = "FAIL", false
			}
		}

		fmt.Fprintf(out, "| %-40s | %9s | %9s | %5s | %-22s | %-7s |\n", what, figure, p99, n, limit, v)
	}

	fmt.Fprintf(out, "| %-40s | %9s | %9s | %5s | %-22s | %-7s |\n|---|---:|---:|---:|---|---|\n", "operation", "p50",
		"p99", "n", "limit", "verdict")
	timed := func(op operation, limit time.Duration) {
		s := f.Samples[op]
		text := ""
		if limit > 0 {
			text = "p50 ≤ " + ms(limit)
		}
		row(string(op), ms(quantile(s, 50)), ms(quantile(s, 99)), fmt.Sprint(len(s)), text, quantile(s, 50) <= limit)
	}

	timed(floorCall, 0)
	timed(containerStats, containerStatsLimit)
	timed(podStats, podStatsLimit)
	timed(podMetrics, podMetricsLimit)
	timed(streamMetrics, podMetricsLimit)
	timed(metricsPage, 0)
	timed(engineStats, 0)
	row("bytes sent beyond the heartbeat", fmt.Sprint(f.asked), "", "", fmt.Sprintf("≤ %d", askedLimit),
		f.asked <= askedLimit)
	row("CPU a second, nobody asks", ms(f.idle), "", "", "≤ "+ms(idleLimit), f.idle <= idleLimit)
	row("CPU a second, as a kubelet asks", ms(f.polling), "", "", "≤ "+ms(pollingLimit), f.polling <= pollingLimit)
	row("the same, PodAndContainerStatsFromCRI", ms(f.pollingPods), "", "", "≤ "+ms(pollingLimit),
		f.pollingPods <= pollingLimit)
	row("memory of the daemon (RSS) before", fmt.Sprintf("%.1f MiB", float64(f.rssBefore)/(1<<20)), "", "", "", true)
	row("memory of the daemon (RSS)", fmt.Sprintf("%.1f MiB", float64(f.rss)/(1<<20)), "", "",
		fmt.Sprintf("≤ %d MiB", statsRSSLimit>>20), f.rss <= statsRSSLimit)
	fmt.Fprintf(out, "\nAn answer of ListPodSandboxMetrics has %d metrics and %.1f MB.\n", f.metrics,
		float64(f.size)/1e6)

	return ok
}
