// Command bench prints what the daemon costs on a private engine with many pods, beside the floor:
// what the engine and the CNI plugins take by themselves in the same run. "bench logs" compares
// container logs with Docker's json-file, "bench images" pulls with those of Docker alone; "bench
// events" says how long after the engine's events ours come, "bench churn" what the daemon holds
// after thousands of pods, "bench stats" what figures of containers cost, "bench heartbeat" what
// the engine's signs of life cost, "bench load" loads a node with very many pods, "bench streams"
// compares exec with the engine's own and port-forward with containerd's, "bench starts" creates
// and starts of containers in parallel with the engine's own calls. It ends with 1 when a limit is
// missed. It starts the engine and the daemon; the first benchmark then runs the program once more
// inside the engine's namespaces, where the measuring is done.
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

// measureCommand runs the program as the measuring part.
const measureCommand = "measure"

// commands are the other benchmarks. Each says whether all its limits hold.
var commands = map[string]func(context.Context, *harness, []string) bool{
	logsCommand:      benchLogs,
	imagesCommand:    benchImages,
	eventsCommand:    benchEvents,
	churnCommand:     benchChurn,
	statsCommand:     benchStats,
	heartbeatCommand: benchHeartbeat,
	loadCommand:      benchLoad,
	streamsCommand:   benchStreams,
	startsCommand:    benchStarts,
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
			end(func(h *harness) bool { return run(ctx, h, os.Args[2:]) })
			return
		}
	}

	pods := flag.Int("pods", 100, "pods that run meanwhile, with one container each")
	rounds := flag.Int("rounds", 100, "sandboxes that are made through the daemon, and as many without it")
	calls := flag.Int("calls", 500, "calls of each list and status")
	version := flag.String("engine", string(engines.V20), "engine: 20.10 or 29")
	flag.Parse()
	end(func(h *harness) bool {
		return bench(ctx, h, engines.Version(*version), options{Pods: *pods, Rounds: *rounds, Calls: *calls})
	})
}

// harness is what the engines and daemons of a benchmark belong to.
type harness = engines.Program

// end runs a benchmark, ends what it started, and exits with 1 when a limit is missed.
func end(bench func(*harness) bool) {
	h := &harness{}
	ok := func() bool {
		defer h.End()
		return bench(h)
	}()
	if !ok {
		os.Exit(1)
	}
}

// bench does one run and says whether all limits hold.
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

// loadAverage is that of the last minute, which tells how far figures can be trusted.
func loadAverage(h *harness) string {
	loads, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		h.Fatalf("bench: %v", err)
	}
	load, _, _ := strings.Cut(string(loads), " ")
	return load
}

// measure runs the measuring part in the engine's namespaces.
func measure(ctx context.Context, h *harness, e *engines.Engine, o options) figures {
	var f figures
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
		h.Fatalf("bench: the measuring part: %v", err)
	}

	if err := json.Unmarshal(out, &f); err != nil {
		h.Fatalf("bench: %v", err)
	}

	return f
}
