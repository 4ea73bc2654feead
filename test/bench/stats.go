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

// statsCommand runs the program as the benchmark of container stats.
const statsCommand = "stats"

// The limits for container stats.
const (
	containerStatsLimit = 5 * time.Millisecond
	podStatsLimit       = 10 * time.Millisecond
	podMetricsLimit     = 20 * time.Millisecond
	pollingLimit        = 2 * time.Millisecond // CPU per second, while a kubelet polls
	idleLimit           = time.Millisecond     // CPU per second: 0.1 %
	statsRSSLimit       = 35 << 20             // bytes
	// in bytes: some heartbeats; one request per call would be 100 times as much
	engineBytesLimit = 1 << 10
)

const (
	containerStats operation = "ListContainerStats"
	podStats       operation = "ListPodSandboxStats"
	podMetrics     operation = "ListPodSandboxMetrics"
	streamMetrics  operation = "StreamPodSandboxMetrics"
	metricsPage    operation = "/metrics of the daemon"
	engineStats    operation = "engine: stats of one container"
)

// settled is the polling time before the measurement. Unchanged layers are measured twice, ten
// seconds apart.
const settled = 25 * time.Second

// statsResults are the results, in addition to the times.
type statsResults struct {
	results
	asked         int64         // bytes sent to the engine during the calls, without the heartbeat's
	idle          time.Duration // CPU per second
	polling       time.Duration // the same while a kubelet polls lists and container stats
	pollingPods   time.Duration // the same with PodAndContainerStatsFromCRI
	rss           int64         // at the end, in bytes
	rssBefore     int64
	metrics, size int // of one response
}

// benchStats does one run and reports whether all limits hold.
func benchStats(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(statsCommand, flag.ExitOnError)
	pods := flags.Int("pods", 100, "running pods, with one container each")
	calls := flags.Int("calls", 200, "calls of each kind")
	over := flags.Duration("over", 30*time.Second, "measuring time of the idle daemon, and of the daemon while it is "+
		"polled like by a kubelet")
	version := flags.String("engine", string(engines.V20), "engine: 20.10 or 29")
	priority := flags.Bool("priority", false, "run with priority over all other processes, to simulate a quiet "+
		"machine on a busy one")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	load := loadAverage(h)
	e := engines.Start(h, engines.Version(*version))
	c := e.Counted(h)
	d := e.Daemon(h, "--log-level=info", "--docker-endpoint=unix://"+c.Socket)
	m := &measurement{
		options: options{
			Pods:    *pods,
			Calls:   *calls,
			Docker:  "unix://" + e.Socket,
			Parent:  e.CgroupParent,
			Scratch: e.Dir,
		},
		runtime: d.Runtime,
		docker:  e.Docker(h),
		results: results{Samples: map[operation][]time.Duration{}},
	}

	f := statsResults{}
	for _, part := range []func(context.Context) error{m.prepare, m.fill} {
		if err := part(ctx); err != nil {
			h.Fatalf("bench: %v", err)
		}
	}

	if *priority {
		d.Hurry(h)
		out, err := exec.Command("chrt", "-a", "-r", "-p", "1", strconv.Itoa(os.Getpid())).CombinedOutput()
		if err != nil {
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
		// opens files and measures unchanged layers
		{new(time.Duration), settled, true},
		{&f.polling, *over, false},
		{&f.pollingPods, *over, true},
	} {
		*part.cpu = perSecond(ctx, h, d, part.over, func(second int) error {
			return m.asKubelet(ctx, second, part.fromCRI)
		})
	}

	from, before := time.Now(), c.Sent()
	if err := m.measureStats(ctx, h, d, &f); err != nil {
		h.Fatalf("bench: %v", err)
	}

	f.asked = max(0, c.Sent()-before-int64(heartbeat*time.Since(from).Seconds()))
	f.rss, f.results = d.RSS(h), m.results
	fmt.Printf("Docker Engine %s, %d pods with one container each, %d CPUs, load average %s before the run, %s\n\n",
		m.results.Engine, *pods, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))

	return reportStats(os.Stdout, f)
}

// perSecond returns the daemon's CPU usage per second while do runs once per second.
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

// asKubelet makes the calls of a kubelet in one second: lists each time, and stats every ten
// seconds. With PodAndContainerStatsFromCRI these are the stats of pods instead of containers.
func (m *measurement) asKubelet(ctx context.Context, second int, fromCRI bool) error {
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

// measureStats measures the calls in turn, and then some of the engine's own.
func (m *measurement) measureStats(ctx context.Context, h *harness, d *engines.Daemon, f *statsResults) error {
	calls := []call{
		m.version(ctx),
		{containerStats, func() error {
			r, err := m.runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
			return checkCount(len(r.GetStats()), m.Pods, err)
		}},
		{podStats, func() error {
			r, err := m.runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
			return checkCount(len(r.GetStats()), m.Pods, err)
		}},
		{podMetrics, func() error {
			r, err := m.runtime.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
			return checkCount(len(r.GetPodMetrics()), m.Pods, err)
		}},
		{streamMetrics, func() error { return m.stream(ctx) }},
		{metricsPage, func() error {
			return checkCount(strings.Count(d.Metrics(h), "container_memory_rss{"), m.Pods, nil)
		}},
	}

	for i := range m.Calls + warmUp {
		if i == warmUp {
			clear(m.results.Samples)
		}
		if err := m.measureEach(calls); err != nil {
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

func (m *measurement) stream(ctx context.Context) error {
	s, err := m.runtime.StreamPodSandboxMetrics(ctx, &runtimeapi.StreamPodSandboxMetricsRequest{})
	if err != nil {
		return err
	}

	for n := 0; ; {
		page, err := s.Recv()
		if err == io.EOF { //nolint:errorlint // gRPC's contract
			return checkCount(n, m.Pods, nil)
		} else if err != nil {
			return err
		}
		n += len(page.PodSandboxMetrics)
	}
}

// reportStats prints the results as a Markdown table and reports whether all limits hold.
func reportStats(out io.Writer, f statsResults) bool {
	ok := true
	row := func(name, value, p99, n, limit string, good bool) {
		v := ""
		if limit != "" {
			v = "pass"
			if !good {
				v, ok = "FAIL", false
			}
		}

		fmt.Fprintf(out, "| %-40s | %9s | %9s | %5s | %-22s | %-7s |\n", name, value, p99, n, limit, v)
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
	row("bytes sent beyond the heartbeat", fmt.Sprint(f.asked), "", "", fmt.Sprintf("≤ %d", engineBytesLimit),
		f.asked <= engineBytesLimit)
	row("CPU per second, idle", ms(f.idle), "", "", "≤ "+ms(idleLimit), f.idle <= idleLimit)
	row("CPU per second, as a kubelet", ms(f.polling), "", "", "≤ "+ms(pollingLimit),
		f.polling <= pollingLimit)
	row("the same, PodAndContainerStatsFromCRI", ms(f.pollingPods), "", "", "≤ "+ms(pollingLimit),
		f.pollingPods <= pollingLimit)
	row("memory of the daemon (RSS) before", fmt.Sprintf("%.1f MiB", float64(f.rssBefore)/(1<<20)), "", "", "", true)
	row("memory of the daemon (RSS)", fmt.Sprintf("%.1f MiB", float64(f.rss)/(1<<20)), "", "",
		fmt.Sprintf("≤ %d MiB", statsRSSLimit>>20), f.rss <= statsRSSLimit)
	fmt.Fprintf(out, "\nA response of ListPodSandboxMetrics has %d metrics and %.1f MB.\n", f.metrics,
		float64(f.size)/1e6)

	return ok
}
