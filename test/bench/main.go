// Command bench measures the cost of the daemon on a private engine with many pods, beside the
// floor: the cost of the engine and the CNI plugins alone in the same run. Further benchmarks are
// subcommands:
//
//   - logs compares container logs with Docker's json-file.
//   - images compares pulls with Docker's own.
//   - events measures the delay of container events behind the engine's.
//   - churn measures leaks after thousands of pods.
//   - stats measures the cost of container stats.
//   - heartbeat measures the cost of the engine's heartbeat.
//   - load runs a node with very many pods.
//   - streams compares exec with the engine's own, and port-forward with containerd's.
//   - shim compares pods under the containerd shim with those under the engine's runtime.
//   - containerd compares pods under the containerd shim with those of containerd's own CRI.
//   - nri compares a daemon with NRI and no plugin with daemons without NRI.
//   - starts compares concurrent creates and starts of containers with the engine's own calls.
//
// The exit code is 1 if a limit is exceeded. The command starts the engine and the daemon. The
// first benchmark runs the program once more inside the engine's namespaces, and takes its
// measurements there.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"cri-dockerd/test/engines"
)

// measureCommand runs the program as the measuring process.
const measureCommand = "measure"

// commands are the other benchmarks. Each reports whether all limits hold.
var commands = map[string]func(context.Context, *harness, []string) bool{
	logsCommand:       benchLogs,
	imagesCommand:     benchImages,
	eventsCommand:     benchEvents,
	churnCommand:      benchChurn,
	statsCommand:      benchStats,
	heartbeatCommand:  benchHeartbeat,
	loadCommand:       benchLoad,
	streamsCommand:    benchStreams,
	startsCommand:     benchStarts,
	pauseCommand:      benchPause,
	shimCommand:       benchShim,
	containerdCommand: benchContainerd,
	nriCommand:        benchNRI,
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	if len(os.Args) > 1 && os.Args[1] == measureCommand {
		if err := measureInside(ctx, os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}

	if len(os.Args) > 1 {
		if run, ok := commands[os.Args[1]]; ok {
			runAndExit(func(h *harness) bool { return run(ctx, h, os.Args[2:]) })
			return
		}
	}

	pods := flag.Int("pods", 100, "running pods, with one container each")
	rounds := flag.Int("rounds", 100, "sandboxes to create through the daemon, and as many without it")
	calls := flag.Int("calls", 500, "calls of each list and status")
	version := flag.String("engine", string(engines.V20), "engine: 20.10 or 29")
	flag.Parse()
	runAndExit(func(h *harness) bool {
		return bench(ctx, h, engines.Version(*version), options{Pods: *pods, Rounds: *rounds, Calls: *calls})
	})
}

// harness owns the engines and daemons of a benchmark.
type harness = engines.Program

// runAndExit runs a benchmark, stops its processes, and exits with 1 if a limit is exceeded.
func runAndExit(bench func(*harness) bool) {
	h := &harness{}
	ok := func() bool {
		defer h.End()
		return bench(h)
	}()
	if !ok {
		os.Exit(1)
	}
}

// bench does one run and reports whether all limits hold.
func bench(ctx context.Context, h *harness, v engines.Version, o options) bool {
	load := loadAverage(h)
	e := engines.Start(h, v)
	d := e.Daemon(h, "--log-level=info")
	o.CRI, o.Docker, o.Cache, o.Scratch = "unix://"+d.Socket, "unix://"+e.Socket, d.CacheDir, e.Dir
	f := measure(ctx, h, e, o)
	rss := d.RSS(h)
	d.Change(h, "--log-level=info", "--pod-netns=engine")
	d.AwaitReady(h)
	o.EngineMode = true
	maps.Copy(f.Samples, measure(ctx, h, e, o).Samples)
	fmt.Printf("Docker Engine %s, %d pods with one container each, %d CPUs, load average %s before the run, %s\n\n",
		f.Engine, o.Pods, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))

	return report(os.Stdout, f, rss)
}

// loadAverage returns the load average of the last minute, an indication of the results' accuracy.
func loadAverage(h *harness) string {
	loads, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		h.Fatalf("bench: %v", err)
	}
	load, _, _ := strings.Cut(string(loads), " ")
	return load
}

// measure runs the measuring process in the engine's namespaces.
func measure(ctx context.Context, h *harness, e *engines.Engine, o options) results {
	var f results
	self, err := os.Executable()
	if err != nil {
		h.Fatalf("bench: %v", err)
	}

	args, err := json.Marshal(o)
	if err != nil {
		h.Fatalf("bench: %v", err)
	}

	cmd := e.Command(self, measureCommand, string(args))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil || ctx.Err() != nil {
		h.Fatalf("bench: measuring process: %v", err)
	}

	if err := json.Unmarshal(out, &f); err != nil {
		h.Fatalf("bench: %v", err)
	}

	return f
}
