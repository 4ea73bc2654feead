package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"syscall"
	"time"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/view"
	"cri-dockerd/test/engines"
)

// heartbeatCommand runs the program as the benchmark of the daemon's heartbeat requests to the
// engine.
const heartbeatCommand = "heartbeat"

// heartbeatLimit limits the CPU time of daemon and engine for one second of heartbeat and event
// check.
const heartbeatLimit = 500 * time.Microsecond

// requestCost is the CPU time of one request.
type requestCost struct{ ours, engine time.Duration }

// benchHeartbeat does one run for each engine and reports whether all limits hold.
func benchHeartbeat(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(heartbeatCommand, flag.ExitOnError)
	pods := flags.Int("pods", 100, "running pods, with one container each")
	calls := flags.Int("calls", 1000, "requests of each kind")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	ok := true
	for _, v := range engines.Versions() {
		load := loadAverage(h)
		ping, check := heartbeat(ctx, h, v, *pods, *calls)
		fmt.Printf("Docker Engine %s, %d pods with one container each, %d CPUs, load average %s before the run, %s\n\n",
			v, *pods, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))
		ok = reportHeartbeat(os.Stdout, ping, check) && ok
	}

	return ok
}

// heartbeat measures the requests in a loop. At their normal rate they are lost in the engine's own
// activity.
func heartbeat(ctx context.Context, h *harness, v engines.Version, pods, calls int) (ping, check requestCost) {
	e := engines.Start(h, v)
	d := e.Daemon(h, "--log-level=info")
	m := &measurement{
		options: options{Pods: pods, Docker: "unix://" + e.Socket, Parent: e.CgroupParent, Scratch: e.Dir},
		runtime: d.Runtime,
		docker:  e.Docker(h),
		results: results{Samples: map[operation][]time.Duration{}},
	}

	for _, part := range []func(context.Context) error{m.prepare, m.fill} {
		if err := part(ctx); err != nil {
			h.Fatalf("bench: %v", err)
		}
	}

	docker, err := engine.New(engine.Config{Endpoint: m.Docker, Log: slog.New(slog.DiscardHandler)})
	if err == nil {
		_, err = docker.Host(ctx)
	}

	if err != nil {
		h.Fatalf("bench: %v", err)
	}
	defer docker.Close()

	d.Kill(h) // exclude the daemon's own requests
	defer d.Restart(h)

	ping = measureCost(h, e, calls, func() error { return docker.Ping(ctx) })
	check = measureCost(h, e, calls, func() error {
		until := time.Now().Add(-time.Second)
		_, err := docker.EventsBetween(ctx, until.Add(-view.CheckInterval), until)
		return err
	})

	return ping, check
}

// measureCost returns the mean CPU time of one request, without the engine's idle usage.
func measureCost(h *harness, e *engines.Engine, calls int, do func() error) requestCost {
	const idleTime = 5 * time.Second
	begin := e.CPU(h)
	time.Sleep(idleTime)
	idle := float64(e.CPU(h)-begin) / float64(idleTime)

	ours, theirs, began := ownCPU(h), e.CPU(h), time.Now()
	for range calls {
		if err := do(); err != nil {
			h.Fatalf("bench: %v", err)
		}
	}

	took := time.Since(began)
	n := time.Duration(calls)

	return requestCost{
		ours:   (ownCPU(h) - ours) / n,
		engine: (e.CPU(h) - theirs - time.Duration(idle*float64(took))) / n,
	}
}

// ownCPU returns this process's CPU time (getrusage(2)).
func ownCPU(h *harness) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		h.Fatalf("bench: %v", err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// reportHeartbeat prints the costs as a Markdown table and reports whether the limit holds.
func reportHeartbeat(out io.Writer, ping, check requestCost) bool {
	fmt.Fprintln(out, "| CPU | daemon | engine | every | a second | limit | verdict |\n"+
		"|---|---:|---:|---:|---:|---|---|")
	var total time.Duration
	for _, row := range []struct {
		name  string
		cost  requestCost
		every time.Duration
	}{
		{"ping", ping, view.HeartbeatInterval},
		{"check of events", check, view.CheckInterval},
	} {
		second := time.Duration(float64(row.cost.ours+row.cost.engine) / row.every.Seconds())
		total += second
		fmt.Fprintf(out, "| %s | %s | %s | %s | %.3f ms | | |\n", row.name, ms(row.cost.ours), ms(row.cost.engine),
			row.every, float64(second)/1e6)
	}

	verdict := "pass"
	if total > heartbeatLimit {
		verdict = "FAIL"
	}

	fmt.Fprintf(out, "| both | | | | %.3f ms | ≤ %s | %s |\n\n", float64(total)/1e6, ms(heartbeatLimit), verdict)

	return total <= heartbeatLimit
}
