package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/test/engines"
)

// logsCommand runs the program as the benchmark of container logs.
const logsCommand = "logs"

// lineSize is the length of the containers' lines, including the newline, in bytes.
const lineSize = 100

// clockTick is the unit of CPU time in /proc (USER_HZ, proc(5)).
const clockTick = 10 * time.Millisecond

// logOptions are the dimensions of the benchmark.
type logOptions struct {
	lines, pairs, busy int
	settle             time.Duration
}

// logRun is the cost of one container printing all lines, from its start until the engine has
// recorded its end.
type logRun struct {
	took        time.Duration
	engine, own time.Duration // CPU time of dockerd and of the log-driver process
}

// logResults are the results. The two runs of a pair have the same index.
type logResults struct {
	cri, jsonFile []logRun
	rss           int64         // of the log-driver process while many containers print, in bytes
	idle          time.Duration // its CPU time during idleFor, while all containers are silent
}

// idleFor is the measuring time of the idle process.
const idleFor = 10 * time.Second

// logBench runs the benchmark on one engine.
type logBench struct {
	logOptions
	engine *engines.Engine
	docker *client.Client
	image  string
	pids   struct{ engine, driver string } // in the engine's PID namespace
}

// benchLogs compares the log-driver process with Docker's json-file, and reports whether all limits
// hold.
func benchLogs(ctx context.Context, h *harness, args []string) bool {
	f := flag.NewFlagSet(logsCommand, flag.ExitOnError)
	var o logOptions
	f.IntVar(&o.lines, "lines", 2_000_000, "lines of 100 bytes printed by each container")
	f.IntVar(&o.pairs, "pairs", 5, "containers of each log driver, alternating")
	f.IntVar(&o.busy, "busy", 100, "concurrently printing containers for the memory measurement")
	f.DurationVar(&o.settle, "settle", 10*time.Second, "time before the memory measurement")
	version := f.String("engine", string(engines.V20), "engine: 20.10 or 29")
	_ = f.Parse(args) // exits on error
	e := engines.Start(h, engines.Version(*version))
	e.Daemon(h, "--log-level=info") // starts the log-driver process
	b := &logBench{logOptions: o, engine: e, docker: e.Docker(h), image: e.ImportBusybox(h)}
	results, err := b.measure(ctx)
	if err != nil {
		h.Fatalf("bench: %v", err)
	}

	fmt.Printf("Docker Engine %s, %d lines of %d bytes, %d CPUs, %s\n\n", *version, o.lines, lineSize, runtime.NumCPU(),
		time.Now().UTC().Format(time.DateOnly))

	return reportLogs(os.Stdout, results, o)
}

func (b *logBench) measure(ctx context.Context) (f logResults, err error) {
	pid, err := b.engine.Command("pgrep", "-f", "^/proc/self/exe log-driver").Output()
	if err != nil {
		return f, fmt.Errorf("the log-driver process is not running: %w", err)
	}

	b.pids.driver = strings.TrimSpace(string(pid))
	if pid, err = os.ReadFile(filepath.Join(b.engine.Dir, "docker.pid")); err != nil {
		return f, err
	}

	b.pids.engine = strings.TrimSpace(string(pid))
	for i := range b.pairs {
		fmt.Fprintf(os.Stderr, "bench: pair %d of %d\n", i+1, b.pairs)
		sides := []struct {
			driver string
			runs   *[]logRun
		}{{driver.Name, &f.cri}, {"json-file", &f.jsonFile}}
		if i%2 == 1 {
			slices.Reverse(sides)
		}

		for _, s := range sides {
			r, err := b.printAll(ctx, s.driver)
			if err != nil {
				return f, fmt.Errorf("%s: %w", s.driver, err)
			}
			*s.runs = append(*s.runs, r)
		}
	}

	f.rss, f.idle, err = b.measureMany(ctx)

	return f, err
}

// create creates a container with a log driver. Docker's own client creates the containers of both
// drivers in the same way.
func (b *logBench) create(ctx context.Context, driverName, script string) (id, log string, err error) {
	cfg := container.LogConfig{Type: driverName}
	dir, err := os.MkdirTemp(b.engine.Dir, "logs")
	if err != nil {
		return "", "", err
	}

	if driverName == driver.Name {
		cfg.Config = map[string]string{
			driver.OptionDirectory: dir,
			driver.OptionPath:      "0.log",
			"cache-disabled":       "true",
		}
	}

	r, err := b.docker.ContainerCreate(ctx, client.ContainerCreateOptions{
		Config:     &container.Config{Image: b.image, Cmd: []string{"sh", "-c", script}},
		HostConfig: &container.HostConfig{NetworkMode: "none", LogConfig: cfg},
	})

	return r.ID, filepath.Join(dir, "0.log"), err
}

func (b *logBench) remove(ctx context.Context, id, log string) error {
	_, err := b.docker.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true})
	return errors.Join(err, os.RemoveAll(filepath.Dir(log)))
}

// printAll measures a container that prints as fast as possible. Its log must have every line.
func (b *logBench) printAll(ctx context.Context, driverName string) (r logRun, err error) {
	id, log, err := b.create(ctx, driverName, fmt.Sprintf("yes %s | head -n %d", strings.Repeat("x", lineSize-1),
		b.lines))
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, b.remove(ctx, id, log)) }()

	engine, own, err := b.cpu()
	if err != nil {
		return r, err
	}

	began := time.Now()
	if _, err := b.docker.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
		return r, err
	}

	w := b.docker.ContainerWait(ctx, id, client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
	select {
	case err = <-w.Error:
		return r, err
	case <-w.Result:
	}

	r.took = time.Since(began)
	r.engine, r.own, err = b.cpu()
	if err != nil {
		return r, err
	}

	r.engine, r.own = r.engine-engine, r.own-own
	if driverName == "json-file" {
		in, err := b.docker.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
		if err != nil {
			return r, err
		}

		log, err := os.Open(in.Container.LogPath)
		if err != nil {
			return r, err
		}
		defer log.Close()

		return r, b.check(log)
	}

	f, err := os.Open(log)
	if err != nil {
		return r, err
	}
	defer f.Close()

	return r, b.check(f)
}

// check counts a log's lines.
func (b *logBench) check(log io.Reader) error {
	n, buf := 0, make([]byte, 1<<20)
	for {
		k, err := log.Read(buf)
		n += bytes.Count(buf[:k], []byte("\n"))
		if errors.Is(err, io.EOF) {
			break
		}

		if err != nil {
			return err
		}
	}

	if n != b.lines {
		return fmt.Errorf("the log has %d of %d lines", n, b.lines)
	}

	return nil
}

// cpu returns the CPU time of the engine and of the log-driver process so far. containerd and its
// shims never touch the lines.
func (b *logBench) cpu() (engine, own time.Duration, err error) {
	for pid, to := range map[string]*time.Duration{b.pids.engine: &engine, b.pids.driver: &own} {
		stat, err := b.engine.Command("cat", "/proc/"+pid+"/stat").Output()
		if err != nil {
			return 0, 0, fmt.Errorf("process %s: %w", pid, err)
		}

		_, fields, _ := strings.Cut(string(stat), ") ")
		f := strings.Fields(fields)
		for _, field := range []int{11, 12} { // utime and stime, counted from the state
			ticks, err := strconv.ParseInt(f[field], 10, 64)
			if err != nil {
				return 0, 0, err
			}
			*to += time.Duration(ticks) * clockTick
		}
	}

	return engine, own, nil
}

// measureMany runs many containers at 1,000 lines a second each, reads the process's memory, pauses
// the containers and measures the process's CPU time.
func (b *logBench) measureMany(ctx context.Context) (rss int64, idle time.Duration, err error) {
	fmt.Fprintf(os.Stderr, "bench: %d containers at once\n", b.busy)
	script := fmt.Sprintf("while :; do yes %s | head -n 100; usleep 100000; done", strings.Repeat("x", lineSize-1))
	var ids []string
	for range b.busy {
		id, log, err := b.create(ctx, driver.Name, script)
		if err != nil {
			return 0, 0, err
		}
		defer func() { err = errors.Join(err, b.remove(ctx, id, log)) }()

		if _, err := b.docker.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
			return 0, 0, err
		}

		ids = append(ids, id)
	}

	time.Sleep(b.settle)
	status, err := b.engine.Command("grep", "VmRSS", "/proc/"+b.pids.driver+"/status").Output()
	if err != nil {
		return 0, 0, err
	}

	kib, err := strconv.ParseInt(strings.Fields(string(status))[1], 10, 64)
	if err != nil {
		return 0, 0, err
	}

	for _, id := range ids { // a paused container is running and silent
		if _, err := b.docker.ContainerPause(ctx, id, client.ContainerPauseOptions{}); err != nil {
			return 0, 0, err
		}
	}

	_, before, err := b.cpu()
	if err != nil {
		return 0, 0, err
	}

	time.Sleep(idleFor)
	_, after, err := b.cpu()

	return kib << 10, after - before, err
}

// The limits for CRI logs.
const (
	cpuLimit     = 1.2 // multiple of json-file's
	logRSSLimit  = 20 << 20
	logIdleLimit = clockTick // the resolution of the clock
)

// reportLogs prints the results as a Markdown table and reports whether all limits hold.
func reportLogs(out io.Writer, f logResults, o logOptions) bool {
	ok := true
	verdict := func(good bool) string {
		ok = ok && good
		if good {
			return "pass"
		}
		return "FAIL"
	}

	took := func(r logRun) time.Duration { return r.took }
	cpu := func(r logRun) time.Duration { return r.engine + r.own }
	perSecond := func(r logRun) float64 { return float64(o.lines*lineSize) / r.took.Seconds() / (1 << 20) }
	perLine := func(r logRun) float64 { return float64(cpu(r).Nanoseconds()) / float64(o.lines) }
	fmt.Fprintln(out, "| pair | CRI files, MiB/s | json-file, MiB/s | throughput, times | CRI files, CPU ns/line "+
		"(engine + process) | json-file, CPU ns/line | CPU, times |")
	fmt.Fprintln(out, "|---:|---:|---:|---:|---:|---:|---:|")
	var speed, cost []float64
	for i, r := range f.cri {
		j := f.jsonFile[i]
		speed = append(speed, float64(took(j))/float64(took(r)))
		cost = append(cost, float64(cpu(r))/float64(cpu(j)))
		fmt.Fprintf(out, "| %d | %.1f | %.1f | %.2f | %.0f (%.0f + %.0f) | %.0f | %.2f |\n",
			i+1, perSecond(r), perSecond(j), speed[i], perLine(r),
			float64(r.engine.Nanoseconds())/float64(o.lines), float64(r.own.Nanoseconds())/float64(o.lines),
			perLine(j), cost[i])
	}

	fmt.Fprintln(out, "\n| metric | value | limit | verdict |\n|---|---:|---|---|")
	fmt.Fprintf(out, "| throughput, median of pairs | %.2f × json-file | ≥ 1.00 | %s |\n", median(speed),
		verdict(median(speed) >= 1))
	fmt.Fprintf(out, "| CPU per line, engine + process, median of pairs | %.2f × json-file | ≤ %.2f | %s |\n",
		median(cost), cpuLimit, verdict(median(cost) <= cpuLimit))
	fmt.Fprintf(out, "| memory of the process (RSS), %d containers printing | %.1f MiB | ≤ %d MiB | %s |\n", o.busy,
		float64(f.rss)/(1<<20), logRSSLimit>>20, verdict(f.rss <= logRSSLimit))
	fmt.Fprintf(out, "| CPU time of the process in %s, all of them silent | %s | ≤ %s, one tick | %s |\n", idleFor,
		f.idle, logIdleLimit, verdict(f.idle <= logIdleLimit))

	return ok
}

// median returns the middle value, or 0 for an empty slice.
func median[T cmp.Ordered](v []T) (m T) {
	if len(v) == 0 {
		return m
	}
	return slices.Sorted(slices.Values(v))[len(v)/2]
}
